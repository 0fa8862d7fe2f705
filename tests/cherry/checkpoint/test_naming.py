"""Names of checkpoint directories and the committed ones among them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from base import storage
from cherry.checkpoint.checkpointer import Checkpointer
from cherry.checkpoint.naming import committed_steps, newest_checkpoint, step_name, step_of, unreadable_checkpoints
from tests.cherry.checkpoint.saving import build


def test_the_newest_is_so_by_number_and_not_by_name(open_saver: Callable[..., Checkpointer]) -> None:
    saver = open_saver(keep_last=2)
    for step in (5, 999_999, 1_000_000):
        saver.save(step, *build(), {"step": step})
    assert storage.list_names(saver.directory) == ["step_1000000", "step_999999"]
    assert newest_checkpoint(saver.directory) == saver.last_saved
    assert saver.last_saved_step == 1_000_000


@pytest.mark.parametrize(
    ("uri", "step"),
    [
        ("step_1000", 1000),
        ("s3://bucket/run/checkpoints/step_7/", 7),
        ("step_", None),
        ("step_7.tmp", None),
        ("my_step_7", None),
        ("step_7/model", None),
    ],
)
def test_a_step_is_read_from_the_last_part_of_a_uri(uri: str, step: int | None) -> None:
    assert step_of(uri) == step
    if step is not None:
        assert step_of(step_name(step)) == step


def test_only_committed_steps_count_and_the_newest_may_be_limited(tmp_path: Path) -> None:
    directory = str(tmp_path / "checkpoints")
    assert committed_steps(directory) == []
    assert newest_checkpoint(directory) is None
    for step in (8, 100, 12):
        storage.commit(f"{directory}/{step_name(step)}")
    (tmp_path / "checkpoints" / "step_200").mkdir()
    storage.commit(f"{directory}/other")
    assert committed_steps(directory) == [8, 12, 100]
    assert newest_checkpoint(directory) == f"{directory}/step_100"
    assert newest_checkpoint(directory, before=100) == f"{directory}/step_12"
    assert newest_checkpoint(directory, before=8) is None


def test_an_empty_or_cut_marker_is_told_from_none(tmp_path: Path) -> None:
    directory = str(tmp_path / "checkpoints")
    assert unreadable_checkpoints(directory) == []
    storage.commit(f"{directory}/step_2")
    storage.write_bytes(f"{directory}/step_12/state.json", b"{}")
    for step in (10, 4):
        storage.write_bytes(f"{directory}/step_{step}/{storage.MARKER}", b"")
    assert committed_steps(directory) == [2]
    assert unreadable_checkpoints(directory) == [f"{directory}/step_4", f"{directory}/step_10"]
