"""Trainer hooks: every event in order, over a resume and a rollback, and what a failing hook does."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from base.errors import DataError
from cherry.heldout import Heldout
from cherry.hooks.protocol import HookList, TrainerHook
from cherry.job_config import JobConfig
from cherry.train_record import TrainRecord
from cherry.trainer import Trainer

Make = Callable[..., Trainer]


class Recorder(TrainerHook):
    """Keeps every event."""

    def __init__(self) -> None:
        self.events: list[tuple[str, Any]] = []

    def on_step_begin(self, step: int) -> None:
        self.events.append(("begin", step))

    def on_evaluate(self, step: int, heldout: Heldout) -> None:
        assert heldout.loss > 0
        self.events.append(("evaluate", step))

    def on_step_end(self, record: TrainRecord) -> None:
        self.events.append(("end", record.step))

    def on_save(self, step: int, checkpoint: str) -> None:
        assert checkpoint.endswith(f"/step_{step}")
        self.events.append(("save", step))

    def close(self) -> None:
        self.events.append(("close", None))


@pytest.fixture
def make(
    mini: Callable[..., JobConfig], prepared_data: Path, tmp_path: Path, group: dist.ProcessGroup
) -> Iterator[Make]:
    """Makes trainers in one run directory."""
    made: list[Trainer] = []

    def build(*overrides: str, hooks: list[TrainerHook]) -> Trainer:
        if not (tmp_path / "data").exists():
            (tmp_path / "data").symlink_to(prepared_data)
        made.append(Trainer(mini(*overrides), str(tmp_path), hooks=hooks))
        return made[-1]

    yield build
    for trainer in made:
        trainer.close()


def steps(first: int, last: int, *, evaluated: set[int] = frozenset(), saved: set[int] = frozenset()) -> list[Any]:  # type: ignore[assignment]
    events: list[tuple[str, Any]] = []
    for step in range(first, last + 1):
        events.append(("begin", step))
        events += [("evaluate", step)] if step in evaluated else []
        events.append(("end", step))
        events += [("save", step)] if step in saved else []
    return events


def test_a_hook_sees_every_event_in_order_and_a_resume_begins_after_the_checkpoint(make: Make, tmp_path: Path) -> None:
    whole, resumed = Recorder(), Recorder()
    trainer = make("train.evaluate_every_steps=5", hooks=[whole])
    trainer.run()
    assert whole.events == [*steps(1, 12, evaluated={5, 10, 12}, saved={4, 8, 12}), ("close", None)]
    trainer.close()
    assert whole.events.count(("close", None)) == 1
    shutil.rmtree(tmp_path / "train" / "checkpoints" / "step_12")
    make(hooks=[resumed]).run()
    assert resumed.events == [*steps(9, 12, evaluated={12}, saved={12}), ("close", None)]


class BlowsUp(Recorder):
    """Scales the weights out of range once, before step 7."""

    trainer: Trainer

    def on_step_begin(self, step: int) -> None:
        if step == 7 and ("begin", 7) not in self.events:
            with torch.no_grad():
                for parameter in self.trainer.model.parameters():
                    parameter.mul_(1e25)
        super().on_step_begin(step)


def test_a_rollback_is_seen_as_steps_that_begin_again(make: Make, tmp_path: Path) -> None:
    hook = BlowsUp()
    hook.trainer = make("train.max_skipped_steps=2", hooks=[hook])
    hook.trainer.run()
    again = steps(5, 12, evaluated={12}, saved={8, 12})
    assert hook.events == [*steps(1, 8, saved={4}), *again, ("close", None)]
    lines = (tmp_path / "train" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, 13)), "undone steps are dropped"


class Fails(Recorder):
    """Fails at one step."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error

    def on_step_end(self, record: TrainRecord) -> None:
        super().on_step_end(record)
        if record.step == 3:
            raise self.error


def test_a_hook_with_a_bug_is_closed_and_left_out_and_training_goes_on(
    make: Make, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    broken, other = Fails(ZeroDivisionError("of the user's own")), Recorder()
    result = make(hooks=[broken, other]).run()
    assert result["steps"] == 12
    assert broken.events == [*steps(1, 3), ("close", None)]
    assert other.events == [*steps(1, 12, evaluated={12}, saved={4, 8, 12}), ("close", None)]
    line = "Fails failed in on_step_end and is no longer called, training continues: ZeroDivisionError"
    assert line in capsys.readouterr().out
    (record,) = [record for record in caplog.records if record.name == "cherry.hooks.protocol"]
    assert record.exc_info is not None and record.exc_info[1] is broken.error


def test_an_error_of_the_project_s_family_ends_the_run(make: Make, tmp_path: Path) -> None:
    stops, other = Fails(DataError("enough")), Recorder()
    with pytest.raises(DataError, match="enough"):
        make(hooks=[stops, other]).run()
    assert stops.events == [*steps(1, 3), ("close", None)]
    assert other.events == [*steps(1, 2), ("begin", 3), ("close", None)]
    assert not (tmp_path / "train" / "result.json").exists()


class FailsToClose(Recorder):
    """Raises when it is closed."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error

    def close(self) -> None:
        super().close()
        raise self.error


def test_every_hook_is_closed_though_others_fail_to_close() -> None:
    lines: list[str] = []
    hooks = [FailsToClose(DataError("first")), FailsToClose(ValueError("bug")), Recorder()]
    listed = HookList(hooks, lines.append)
    with pytest.raises(DataError, match="first"):
        listed.close()
    assert [hook.events for hook in hooks] == [[("close", None)]] * 3
    assert len(lines) == 1 and "failed in close" in lines[0] and "bug" in lines[0]
