"""The metrics stream after a resume or a kill, its printed line, and attempts that were superseded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from cherry.metrics import MetricsWriter, format_line, peak_flops
from cherry.train_record import TrainRecord


def steps(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def written(path: Path, last: int) -> None:
    writer = MetricsWriter(path, resume_step=0)
    for step in range(1, last + 1):
        writer.write(TrainRecord(step=step, loss=10.0 - step))
    writer.close()


def test_a_resume_drops_what_lies_past_its_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    written(path, 7)
    writer = MetricsWriter(path, resume_step=4)
    assert (writer.first_loss, writer.last_loss) == (9.0, 6.0)
    assert steps(path) == [1, 2, 3, 4]
    writer.write(TrainRecord(step=5, loss=0.5))
    assert steps(path) == [1, 2, 3, 4, 5], "a line is in the file when write returns"
    assert (writer.first_loss, writer.last_loss) == (9.0, 0.5)
    writer.close()


def test_lines_that_the_file_has_lost_come_back_from_the_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    written(path, 7)
    writer = MetricsWriter(path, resume_step=7)
    writer.write(TrainRecord(step=8, loss=2.0))
    saved = writer.recent()  # as the checkpoint of step 8 keeps them
    writer.write(TrainRecord(step=9, loss=1.0))
    writer.close()
    assert [json.loads(line)["step"] for line in saved] == [8]
    written(path, 6)
    MetricsWriter(path, resume_step=8, saved=saved).close()
    assert steps(path) == [*range(1, 7), 8], "what was older than a minute is not there"
    written(path, 9)
    again = MetricsWriter(path, resume_step=8, saved=saved)
    assert steps(path) == list(range(1, 9)), "none twice"
    assert again.recent() == saved, "the next checkpoint has them too"
    again.close()
    rolled_back = MetricsWriter(path, resume_step=7, saved=saved)
    assert steps(path) == list(range(1, 8))
    assert rolled_back.recent() == []
    rolled_back.close()


def test_a_new_start_drops_everything(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    written(path, 3)
    writer = MetricsWriter(path, resume_step=0)
    writer.close()
    assert path.read_text() == ""
    assert writer.first_loss is None


@pytest.mark.parametrize("cut", [*range(1, 9), 20, 100, 300])
def test_a_line_that_a_kill_cut_short_is_dropped_and_nothing_is_glued_to_it(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "metrics.jsonl"
    written(path, 5)
    content = path.read_text()
    assert len(content.splitlines()[-1]) > 300
    path.write_text(content[:-cut])
    whole = 5 if cut == 1 else 4  # without its newline alone the last line still says everything
    writer = MetricsWriter(path, resume_step=100)
    writer.write(TrainRecord(step=6, loss=4.0))
    writer.close()
    assert steps(path) == [*range(1, whole + 1), 6]


def test_an_attempt_that_was_superseded_writes_to_no_file_that_anyone_reads(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    old = MetricsWriter(path, resume_step=0)
    old.write(TrainRecord(step=1, loss=1.0))
    new = MetricsWriter(path, resume_step=1)
    old.write(TrainRecord(step=2, loss=99.0))
    new.write(TrainRecord(step=2, loss=0.5))
    old.close()
    new.close()
    assert [json.loads(line)["loss"] for line in path.read_text().splitlines()] == [1.0, 0.5]


@pytest.mark.parametrize(
    ("seconds", "speed", "expected"),
    [
        (72.4, 8123.0, "8.1k tok/s mfu 3.1% (causal) load 1.21 eta 1m12s"),
        (5.0, 999.4, "999 tok/s mfu 3.1% (causal) load 1.21 eta 0m05s"),
        (3600.0, 1e6, "1000.0k tok/s mfu 3.1% (causal) load 1.21 eta 1h00m"),
        (90061.0, 1000.0, "1.0k tok/s mfu 3.1% (causal) load 1.21 eta 25h01m"),
    ],
)
def test_the_printed_line(seconds: float, speed: float, expected: str) -> None:
    record: dict[str, Any] = {
        "step": 120,
        "steps": 300,
        "loss": 4.8123,
        "grad_norm": 0.934,
        "learning_rate": 0.0029,
        "tokens_per_second": speed,
        "mfu": 0.0312,
        "expert_load_max_over_mean": 1.2125,
        "seconds_left": seconds,
    }
    assert format_line(TrainRecord(**record)) == f"step 120/300 loss 4.812 grad 0.93 lr 2.9e-03 {expected}"
    without = expected.replace("mfu 3.1% (causal) ", "")
    assert (
        format_line(TrainRecord(**{**record, "mfu": None})) == f"step 120/300 loss 4.812 grad 0.93 lr 2.9e-03 {without}"
    )


def test_the_printed_line_has_skipped_steps_and_rollbacks_once_there_are_any() -> None:
    record: dict[str, Any] = {
        **dict.fromkeys(("loss", "grad_norm", "learning_rate", "mfu", "expert_load_max_over_mean"), 1.0),
        **{"step": 5, "steps": 9, "tokens_per_second": 10.0, "seconds_left": 1.0, "skipped_steps": 0, "rollbacks": 0},
    }

    def line(**values: Any) -> str:
        return format_line(TrainRecord(**{**record, **values}))

    assert line().endswith("eta 0m01s")
    assert line(loss=float("nan"), skipped_steps=12).startswith("step 5/9 loss nan grad 1.00")
    assert line(skipped_steps=12, rollbacks=1).endswith("eta 0m01s skipped 12 rollbacks 1")


def test_a_processor_without_a_data_sheet_is_measured() -> None:
    assert peak_flops(torch.device("cpu"), "fp32") > 1e9
