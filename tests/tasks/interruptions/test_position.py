"""How far a run came, from the directories that steps leave."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from base import storage
from cherry.train_record import TrainRecord
from tasks.interruptions.position import how_far, last_metrics, where_training_is
from tasks.records.events import write_event


def test_a_line_that_is_still_being_written_is_not_read(tmp_path: Path) -> None:
    stream = tmp_path / "metrics.jsonl"
    assert last_metrics(stream) is None
    stream.write_text("")
    assert last_metrics(stream) is None
    stream.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0}')
    assert last_metrics(stream) == TrainRecord(step=1, loss=2.0)
    with stream.open("a") as handle:
        handle.write('\n{"note": "no step"}\n')
    assert last_metrics(stream) == TrainRecord(step=2, loss=1.0)


@pytest.mark.parametrize(("layers", "experts", "lines"), [(10, 64, 300), (59, 256, 3)])
def test_the_last_line_is_found_however_long_the_stream_or_the_line(
    tmp_path: Path, layers: int, experts: int, lines: int
) -> None:
    stream = tmp_path / "metrics.jsonl"
    load = [[1 / experts] * experts] * layers  # the second is as long as that of the largest model: 190 kB
    stream.write_text("".join(json.dumps({"step": step, "expert_load": load}) + "\n" for step in range(lines)))
    found = last_metrics(stream)
    assert found is not None
    assert found.step == lines - 1


def test_how_far_training_came_is_said_in_words(tmp_path: Path) -> None:
    assert where_training_is(tmp_path) == ""
    metrics = {"step": 12, "steps": 400, "loss": 2.0}
    storage.write_bytes(f"{tmp_path}/train/metrics.jsonl", f"{json.dumps(metrics)}\n".encode())
    assert where_training_is(tmp_path) == "at step 12 of 400; no checkpoint yet"
    for step in (5, 10):
        storage.commit(f"{tmp_path}/train/checkpoints/step_{step}")
    assert where_training_is(tmp_path) == "at step 12 of 400; checkpoint 10"


def test_how_far_a_run_came_is_the_step_of_its_newest_event(tmp_path: Path) -> None:
    assert how_far(tmp_path) == ""
    write_event(tmp_path, "data", "started")
    write_event(tmp_path, "data", "progress", line="half of it")
    assert how_far(tmp_path) == "in data"
    write_event(tmp_path, "data", "finished", seconds=1.0)
    write_event(tmp_path, "tracking", "progress", line="no answer")
    assert how_far(tmp_path) == "after data"
    write_event(tmp_path, "train", "started")
    assert how_far(tmp_path) == "in train"
    metrics = {"step": 12, "steps": 400, "loss": 2.0}
    storage.write_bytes(f"{tmp_path}/train/metrics.jsonl", f"{json.dumps(metrics)}\n".encode())
    write_event(tmp_path, "train", "failed", line="interrupted")
    assert how_far(tmp_path) == "at step 12 of 400; no checkpoint yet"
    write_event(tmp_path, "evaluate", "failed", line="interrupted")
    assert how_far(tmp_path) == "in evaluate"


def test_what_an_earlier_flow_run_did_is_not_this_ones(tmp_path: Path) -> None:
    storage.write_bytes(f"{tmp_path}/events.jsonl", b'{"time": 100.0, "step": "train", "event": "started"}\n')
    assert how_far(tmp_path, since=99.0) == "in train"
    assert how_far(tmp_path, since=101.0) == ""
