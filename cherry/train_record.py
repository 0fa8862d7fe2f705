"""The record of one optimizer step: a line of metrics.jsonl, a point of each series, a line on the terminal.

Each field is annotated with a description, its unit and how the tracker gets it; the series are listed nowhere else.
No torch: the train step, the plots and `cherry status` read the same record.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, get_type_hints

from base.json_lines import as_record

METRICS_FILE = "metrics.jsonl"
"""File in `train/` of the run directory with a line for each logged step."""
TRAIN = "train"
"""Group of what training minimizes and how."""
THROUGHPUT = "throughput"
"""Group of speed and of bytes on the wire."""


@dataclass(frozen=True)
class FieldInfo:
    """Description of a record's field: meaning, unit, and how the tracker gets it."""

    description: str
    unit: str = ""
    group: str | None = None
    """Group of charts that the tracker shows the field's series in; `None` is no series."""
    tracked_name: str | None = None
    """Name of the series within its group, where it is not the field's."""
    every_step: bool = False
    """Whether each step sends it. Of the other series one point a second is enough: a point costs more than a line of
    metrics.jsonl, and a small model takes ten steps in that time, on the same cores."""
    in_flow_run: bool = False
    """The flow's own run gets the series too: enough to see in a comparison of two runs why one is better."""
    marks_step: bool = False
    """A step with it is one that a person looks for: it is logged whatever the interval, and sends every series."""
    omitted_when_none: bool = False
    """Left out of a line when it is not set; every other field is written as null."""


@dataclass(kw_only=True)
class TrainRecord:
    """One optimizer step. A figure is `None` in a line that does not have it: not finite, not measured, or older."""

    step: Annotated[int, FieldInfo("optimizer steps taken, skipped ones included", "steps")]
    steps: Annotated[int | None, FieldInfo("optimizer steps of the whole run", "steps")] = None
    loss: Annotated[
        float | None,
        FieldInfo("cross-entropy of the next token", "nats per token", group=TRAIN, every_step=True, in_flow_run=True),
    ] = None
    mtp_loss: Annotated[
        float | None,
        FieldInfo("cross-entropy of the multi-token prediction module", "nats per token", group=TRAIN),
    ] = None
    balance_loss: Annotated[
        float | None, FieldInfo("sequence-wise expert balance loss before its weight", group=TRAIN)
    ] = None
    grad_norm: Annotated[
        float | None, FieldInfo("L2 norm of the gradient before clipping", group=TRAIN, in_flow_run=True)
    ] = None
    learning_rate: Annotated[float | None, FieldInfo("learning rate of the step", group=TRAIN, in_flow_run=True)] = None
    tokens_per_second: Annotated[
        float | None, FieldInfo("tokens of the batch over step_seconds", "tokens/s", group=THROUGHPUT)
    ] = None
    mfu: Annotated[
        float | None, FieldInfo("model FLOP/s over the device's peak; null on a CPU", "fraction", group=THROUGHPUT)
    ] = None
    mfu_convention: Annotated[str | None, FieldInfo("how mfu counts attention's FLOPs")] = None
    expert_load_max_over_mean: Annotated[
        float | None,
        FieldInfo(
            "tokens of the busiest expert over the mean, in the worst layer",
            group=TRAIN,
            in_flow_run=True,
        ),
    ] = None
    expert_load: Annotated[
        list[list[float]] | None,
        FieldInfo("share of a layer's tokens by expert, [layer][expert]", "fraction", omitted_when_none=True),
    ] = None
    bytes_on_wire: Annotated[
        dict[str, int] | None, FieldInfo("bytes that a rank sent, by `axis.kind` of collective", "bytes")
    ] = None
    bytes_on_wire_total: Annotated[int | None, FieldInfo("bytes that a rank sent", "bytes", group=THROUGHPUT)] = None
    reduction_bytes_over_fp32: Annotated[
        float | None,
        FieldInfo("bytes of the gradient reduction over those of one in fp32", "fraction", group=THROUGHPUT),
    ] = None
    step_seconds: Annotated[float | None, FieldInfo("wall time of the step", "s", group=THROUGHPUT)] = None
    seconds_left: Annotated[float | None, FieldInfo("steps left times the mean step time", "s")] = None
    tokens: Annotated[int | None, FieldInfo("tokens trained on so far, without skipped steps", "tokens")] = None
    skipped_steps: Annotated[int | None, FieldInfo("steps skipped so far", "steps", group=TRAIN)] = None
    rollbacks: Annotated[int | None, FieldInfo("rollbacks to a checkpoint so far", group=TRAIN)] = None
    skipped: Annotated[str | None, FieldInfo("why the step was skipped", marks_step=True, omitted_when_none=True)] = (
        None
    )
    corruption: Annotated[
        str | None,
        FieldInfo(
            "silent data corruption that was found, with its rank and host", marks_step=True, omitted_when_none=True
        ),
    ] = None
    time: Annotated[float | None, FieldInfo("unix time at the end of the step", "s")] = None
    heldout_loss: Annotated[
        float | None,
        FieldInfo(
            "cross-entropy on windows of held-out documents",
            "nats per token",
            group=TRAIN,
            tracked_name="heldout_window_loss",  # the evaluate step has one over whole documents
            every_step=True,
            in_flow_run=True,
            marks_step=True,
            omitted_when_none=True,
        ),
    ] = None
    failed_saves: Annotated[
        list[str] | None,
        FieldInfo("checkpoints not written since the last step", marks_step=True, omitted_when_none=True),
    ] = None

    @property
    def marked(self) -> bool:
        """Whether the step is one that a person looks for: evaluated, skipped, or with a failed save."""
        return any(getattr(self, name) is not None for name in _MARKS)

    @property
    def position(self) -> tuple[int, int]:
        """(rollbacks, step), which grows from line to line: a rollback takes the step back, and counts."""
        return self.rollbacks or 0, self.step

    def as_line(self) -> str:
        """One line of metrics.jsonl with its newline; values that are not finite are null, since JSON has no NaN."""
        values = {
            name: value if _is_finite(value) else None
            for name, info in FIELDS.items()
            if (value := getattr(self, name)) is not None or not info.omitted_when_none
        }
        return json.dumps(values) + "\n"

    def points(self, series: Mapping[str, str]) -> list[tuple[str, float]]:
        """(series name, value) of the figures that this step has, for some series by field (see `series_of`)."""
        return [(name, float(value)) for key, name in series.items() if (value := getattr(self, key)) is not None]


def read_records(lines: Iterable[Mapping[str, Any]]) -> list[TrainRecord]:
    """The records that parsed lines of metrics.jsonl hold; damaged ones, and keys of another version, are left out."""
    return [record for line in lines if (record := as_record(TrainRecord, line)) is not None]


def _is_finite(value: object) -> bool:
    return not isinstance(value, float) or math.isfinite(value)


FIELDS: dict[str, FieldInfo] = {
    name: next(entry for entry in hint.__metadata__ if isinstance(entry, FieldInfo))
    for name, hint in get_type_hints(TrainRecord, include_extras=True).items()
}
"""Every field by name, in the order of a line."""
SERIES: dict[str, str] = {
    name: f"{info.group}/{info.tracked_name or name}" for name, info in FIELDS.items() if info.group is not None
}
"""Series name in the tracker by field: what the run of the train step gets. MLflow shows what stands before the slash
as a group of charts."""
FLOW_SERIES: dict[str, str] = {name: series for name, series in SERIES.items() if FIELDS[name].in_flow_run}
"""Series name in the tracker by field, of the series that the flow's run gets too."""
EVERY_STEP: frozenset[str] = frozenset(name for name, info in FIELDS.items() if info.every_step)
"""Fields that each step sends."""
_MARKS = tuple(name for name, info in FIELDS.items() if info.marks_step)
