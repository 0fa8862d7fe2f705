"""How far a run came, read from its directory only: its newest event, training's step and the newest checkpoint."""

from __future__ import annotations

from pathlib import Path

from base.json_lines import read_last
from cherry.checkpoint.naming import committed_steps, step_name
from cherry.train_record import TrainRecord, read_records
from tasks.records.events import last_event


def last_metrics(metrics_file: Path) -> TrainRecord | None:
    """The record of the newest logged training step; a line that is still being written, or damaged, is skipped."""
    line = read_last(metrics_file, "step", accept=lambda line: bool(read_records([line])))
    return None if line is None else read_records([line])[0]


def last_checkpoint(directory: Path) -> str | None:
    """Name of the newest committed checkpoint in the run directory, like `step_200`."""
    committed = committed_steps(str(directory / "train" / "checkpoints"))
    return step_name(committed[-1]) if committed else None


def where_training_is(directory: Path) -> str:
    """How far training came, like `at step 312 of 400; checkpoint 200`; empty before its first step."""
    metrics, checkpoint = last_metrics(directory / "train" / "metrics.jsonl"), last_checkpoint(directory)
    if metrics is None:
        return ""
    of = "" if metrics.steps is None else f" of {metrics.steps}"
    saved = "no checkpoint yet" if checkpoint is None else f"checkpoint {checkpoint.removeprefix('step_')}"
    return f"at step {metrics.step}{of}; {saved}"


def how_far(directory: Path, *, since: float = 0.0) -> str:
    """How far a run came: as `where_training_is`, or like `in data` or `after evaluate`.

    Args:
        since: Unix time. Empty when the run has no step's event after it.
    """
    event = last_event(directory, lambda event: event.event != "progress")
    if event is None or event.time < since:
        return ""
    step = event.step
    if event.event in ("finished", "reused"):
        return f"after {step}"
    return (where_training_is(directory) if step == "train" else "") or f"in {step}"
