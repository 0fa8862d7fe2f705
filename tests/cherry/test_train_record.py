"""The record of a training step: its line round trip, lines of other versions, and what the tracker gets of it."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from cherry.train_record import EVERY_STEP, FIELDS, FLOW_SERIES, SERIES, TrainRecord, read_records

FULL: dict[str, Any] = {
    **dict.fromkeys(FIELDS, 0.5),
    **{"step": 3, "steps": 9, "tokens": 1024, "skipped_steps": 0, "rollbacks": 1, "bytes_on_wire_total": 7},
    **{"mfu_convention": "causal", "expert_load": [[0.5, 0.5]], "bytes_on_wire": {"dp.all_gather": 7}},
    **{"skipped": "grad_norm inf", "corruption": "rank 1 on node1", "failed_saves": ["disk full"]},
}


def test_a_record_comes_back_from_its_line() -> None:
    (record,) = read_records([FULL])
    assert read_records([json.loads(record.as_line())]) == [record]
    assert list(json.loads(record.as_line())) == list(FIELDS)


def test_what_was_not_measured_is_null_and_what_did_not_happen_is_left_out() -> None:
    line = json.loads(TrainRecord(step=1, loss=math.nan, grad_norm=math.inf).as_line())
    assert (line["loss"], line["grad_norm"], line["mfu"]) == (None, None, None)
    assert line.keys().isdisjoint(("expert_load", "skipped", "corruption", "heldout_loss", "failed_saves"))


def test_a_line_of_another_version_is_read_as_far_as_it_goes() -> None:
    assert read_records([{"step": 4, "loss": 1.5, "of_the_future": 1}]) == [TrainRecord(step=4, loss=1.5)]


def test_damaged_lines_are_left_out() -> None:
    damaged = [{"loss": 1.0}, {"step": None}, {"step": 1, "loss": "low"}, {"step": 2, "expert_load": 5}]
    assert read_records([*damaged, {"step": 3, "loss": math.nan}, {"step": 4}]) == [TrainRecord(step=4)]


def test_series_are_those_that_charts_and_comparisons_know() -> None:
    assert SERIES["heldout_loss"] == "train/heldout_window_loss"
    assert SERIES["tokens_per_second"] == "throughput/tokens_per_second"
    assert all(name.rpartition("/")[2] == field for field, name in SERIES.items() if field != "heldout_loss")
    assert {name.partition("/")[0] for name in SERIES.values()} == {"train", "throughput"}
    assert set(FLOW_SERIES) == {"loss", "heldout_loss", "learning_rate", "grad_norm", "expert_load_max_over_mean"}
    assert {"loss", "heldout_loss"} == EVERY_STEP
    assert {"tokens", "skipped", "expert_load", "seconds_left"}.isdisjoint(SERIES)
    record = TrainRecord(step=1, loss=2.0, heldout_loss=3.0)
    assert record.points(SERIES) == [("train/loss", 2.0), ("train/heldout_window_loss", 3.0)]


@pytest.mark.parametrize(
    "mark", [{"heldout_loss": 0.0}, {"skipped": "spike"}, {"failed_saves": ["full"]}, {"corruption": "rank 1"}]
)
def test_an_evaluated_a_skipped_and_an_unsaved_step_are_marked(mark: dict[str, Any]) -> None:
    assert not TrainRecord(step=1, loss=1.0, skipped_steps=3).marked
    assert TrainRecord(step=1, **mark).marked
