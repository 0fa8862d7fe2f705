"""The metrics hook: which records are written and printed, and which lines a rollback or a resume drops."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cherry.hooks.metrics_hook import MetricsHook
from cherry.train_record import TrainRecord


def record(step: int, **changes: Any) -> TrainRecord:
    figures: dict[str, Any] = {"loss": float(step), "grad_norm": 1.0, "learning_rate": 1e-3, "tokens_per_second": 10.0}
    figures |= {"expert_load_max_over_mean": 1.0, "seconds_left": 1.0}
    return TrainRecord(step=step, steps=9, **{**figures, **changes})


def steps(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def run(hook: MetricsHook, *records: TrainRecord) -> None:
    for train_record in records:
        hook.on_step_begin(train_record.step)
        hook.on_step_end(train_record)


def test_marked_steps_are_written_and_printed_whatever_is_due(tmp_path: Path) -> None:
    path, said = tmp_path / "metrics.jsonl", list[str]()
    hook = MetricsHook(path, resume_step=0, log_every_steps=4, print_line=lambda line, _: said.append(line))
    hook.print_every_s = 3600.0
    marks: dict[int, dict[str, Any]] = {
        2: {"heldout_loss": 1.0},
        3: {"skipped": "loss nan"},
        6: {"failed_saves": ["x"]},
    }
    run(hook, *(record(step, **marks.get(step, {})) for step in range(1, 10)))
    hook.close()
    assert steps(path) == [2, 3, 4, 6, 8, 9]
    printed = [line.split(" ")[1] for line in said if line.startswith("step ") and "/" in line.split(" ")[1]]
    assert printed == ["2/9", "3/9", "6/9", "9/9"], "4 and 8 are due, but come too soon after a printed line"
    assert "step 3 skipped: loss nan" in said
    assert "checkpoint not saved, training continues: x" in said


def test_lines_of_undone_steps_are_dropped_and_the_first_loss_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    hook = MetricsHook(path, resume_step=0, log_every_steps=1, print_line=lambda *_: None)
    run(hook, *(record(step) for step in range(1, 6)))
    run(hook, record(4, loss=40.0), record(5, loss=50.0))
    assert steps(path) == [1, 2, 3, 4, 5]
    hook.close()
    resumed = MetricsHook(path, resume_step=4, log_every_steps=1, print_line=lambda *_: None)
    run(resumed, record(5, loss=51.0))
    resumed.close()
    lines = [json.loads(line)["loss"] for line in path.read_text().splitlines()]
    assert lines == [1.0, 2.0, 3.0, 40.0, 51.0]
    assert resumed.first_loss == 1.0
