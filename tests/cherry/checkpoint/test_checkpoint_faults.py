"""Checkpoints when things go wrong: a disk fills up, an attempt is superseded, or a run goes back to an older step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from base import storage
from base.errors import DiskFullError, SupersededError
from cherry.checkpoint.checkpointer import Checkpointer, restore
from cherry.checkpoint.fence import Fence
from cherry.checkpoint.naming import committed_steps, newest_checkpoint

PAGE_BYTES = 4096
Open = Callable[..., Checkpointer]


def build(seed: int = 0) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 1))
    return model, torch.optim.AdamW(model.parameters())


def weights(model: nn.Module) -> list[list[float]]:
    return [value.flatten().tolist() for value in model.state_dict().values()]


def test_a_save_begins_when_the_one_before_is_committed(open_saver: Open) -> None:
    seen = []

    class Watched(Checkpointer):
        def _writer(self, target: str) -> Any:
            seen.append((target[-1], committed_steps(self.directory)))
            return super()._writer(target)

    saver = open_saver(kind=Watched, asynchronous=True)
    model, optimizer = build()
    for step in (1, 2, 3):
        saver.save(step, model, optimizer, {"step": step})
    saver.wait()
    assert seen == [("1", []), ("2", [1]), ("3", [1, 2])]
    assert committed_steps(saver.directory) == [1, 2, 3]


def test_a_rollback_gives_up_the_checkpoints_after_it(open_saver: Open) -> None:
    """What led to divergence must not pass for the newest, nor push later saves out."""
    saver = open_saver(keep_last=2)
    for step in (4, 8, 12):
        saver.save(step, *build(), {"step": step})
    saver.roll_back(8)
    saver.save(10, *build(), {"step": 10})
    assert newest_checkpoint(saver.directory) == saver.last_saved == f"{saver.directory}/step_10"
    assert committed_steps(saver.directory) == [8, 10]
    saver.roll_back(8)
    saver.save(10, *build(), {"step": 10, "again": True})
    assert storage.read_commit(f"{saver.directory}/step_10")["again"]
    assert saver.failures == []


def test_what_another_run_committed_is_neither_written_to_nor_removed(open_saver: Open) -> None:
    other = open_saver(keep_last=1, keep_every_steps=10)
    for step in (10, 12):
        other.save(step, *build(), {"step": step, "of": "other"})
    saver = open_saver(keep_last=1)
    for step in (8, 9, 10):
        saver.save(step, *build(), {"step": step})
    assert committed_steps(saver.directory) == [9, 10, 12]
    assert storage.read_commit(f"{saver.directory}/step_10")["of"] == "other"
    (failure,) = saver.failures
    assert f"{saver.directory}/step_10 is committed already, and is not written to again" in str(failure)
    assert saver.last_saved_step == 9


def test_a_linked_folder_is_written_through_and_what_it_points_at_outlives_retention(
    open_saver: Open, tmp_path: Path
) -> None:
    disk, elsewhere = tmp_path / "disk", tmp_path / "elsewhere"
    disk.mkdir()
    elsewhere.mkdir()
    (tmp_path / "linked").symlink_to(disk)
    (disk / "step_1").symlink_to(elsewhere)
    saver = open_saver(tmp_path / "linked", keep_last=1)
    for step in (1, 2, 3):
        saver.save(step, *build(), {"step": step})
    assert saver.failures == []
    assert (tmp_path / "linked").is_symlink()
    assert (disk / "step_1").is_symlink()
    assert storage.read_commit(str(elsewhere))["step"] == 1
    assert committed_steps(str(disk)) == [1, 3]


def fill(path: Path, *, but_bytes: int) -> None:
    with pytest.raises(OSError, match="No space left"), path.open("wb", buffering=0) as handle:
        while True:
            handle.write(bytes(PAGE_BYTES))
    with path.open("r+b") as handle:
        handle.truncate(path.stat().st_size - but_bytes)


@pytest.mark.parametrize("free_pages", [0, 1, 3, 5, 7])
def test_a_disk_that_fills_up_at_any_file_of_a_save_costs_that_save_alone(
    group: dist.ProcessGroup, open_saver: Open, small_disk: Callable[[int], Path], free_pages: int
) -> None:
    disk = small_disk(256)
    model, optimizer = build()
    saver = open_saver(disk, asynchronous=True)
    saver.save(1, model, optimizer, {"step": 1})
    saver.wait()
    kept, first = weights(model), saver.last_saved
    assert first is not None
    fill(disk / "filler", but_bytes=free_pages * PAGE_BYTES)
    with torch.no_grad():
        model[0].weight.add_(1.0)  # type: ignore[index, union-attr]
    saver.save(2, model, optimizer, {"step": 2})
    saver.wait()
    assert [type(failure) for failure in saver.failures] == [DiskFullError]
    assert "no space left" in str(saver.failures[0])
    assert newest_checkpoint(saver.directory) == saver.last_saved == first
    assert storage.list_names(saver.directory) == ["filler", "step_1"], "what could be written takes no room"
    other, other_optimizer = build(1)
    restore(first, other, other_optimizer, group)
    assert weights(other) == kept
    (disk / "filler").unlink()
    saver.save(3, model, optimizer, {"step": 3})
    saver.wait()
    assert committed_steps(saver.directory) == [1, 3]
    assert len(saver.failures) == 1


def test_an_attempt_that_was_superseded_leaves_the_newer_one_s_save_of_the_same_step_alone(
    group: dist.ProcessGroup, open_saver: Open, tmp_path: Path
) -> None:
    old, new = (open_saver(fence=Fence(str(tmp_path))) for _ in range(2))
    model, optimizer = build(5)
    new.save(2, model, optimizer, {"step": 2})
    with pytest.raises(SupersededError, match="attempt 2 took over from attempt 1"):
        old.save(2, *build(6), {"step": 2})
    assert newest_checkpoint(new.directory) == new.last_saved == f"{new.directory}/step_2"
    other, other_optimizer = build(1)
    restore(new.last_saved, other, other_optimizer, group)
    assert weights(other) == weights(model)


def test_an_attempt_that_is_superseded_while_it_writes_neither_commits_nor_clears(
    open_saver: Open, tmp_path: Path
) -> None:
    class TakenOver(Checkpointer):
        def _writer(self, target: str) -> Any:
            Fence(str(tmp_path))
            return super()._writer(target)

    old = open_saver(fence=Fence(str(tmp_path)), asynchronous=True, kind=TakenOver)
    old.save(1, *build(), {"step": 1})
    with pytest.raises(SupersededError):
        old.wait()
    assert newest_checkpoint(old.directory) is None
    assert (Path(old.directory) / "step_1" / ".metadata").exists(), "the directory is the newer attempt's now"
