"""Owns `cherry status`: what every run directory says of itself, read from disk alone.

It asks no server, so it answers when Prefect and MLflow are down. It knows file names, not what the steps do.
"""

from __future__ import annotations

import json
import os
import socket
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from base.storage import MARKER
from tasks.process import is_alive

_TAIL_BYTES = 1 << 16


@dataclass(frozen=True)
class RunStatus:
    """One run directory. `loss`, `step` and `steps_total` are those of the newest logged training step."""

    name: str
    directory: Path
    finished: dict[str, float] = field(default_factory=dict)
    """Seconds by finished step, in the order of the run."""
    step: int | None = None
    steps_total: int | None = None
    loss: float | None = None
    seconds_left: float | None = None
    checkpoint: str | None = None
    """Name of the newest committed checkpoint."""
    processes: int = 0
    """Of this host: the one that holds the run, and what it and its step's program have started."""


def read_runs(runs_directory: Path, order: list[str]) -> list[RunStatus]:
    """The status of every run in `runs_directory`, newest first; empty when there is none."""
    if not runs_directory.is_dir():
        return []
    directories = [path.parent for path in runs_directory.glob("*/config.yaml")]
    directories.sort(key=lambda path: (path / "config.yaml").stat().st_mtime, reverse=True)
    return [_read_run(directory, order) for directory in directories]


def last_metrics(metrics_file: Path) -> dict[str, Any] | None:
    """The last whole line of a metrics stream; a line that is still being written is skipped."""
    if not metrics_file.is_file():
        return None
    with metrics_file.open("rb") as handle:
        size = handle.seek(0, os.SEEK_END)
        tail = _TAIL_BYTES
        while True:
            handle.seek(max(0, size - tail))
            record = _last_record(handle.read(min(size, tail)))
            if record is not None or tail >= size:
                return record
            tail *= 4  # a line with the load of every expert of a large model is longer than a tail


def _last_record(tail: bytes) -> dict[str, Any] | None:
    for line in reversed(tail.split(b"\n")[:-1]):
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and "step" in record:
            return record
    return None


def _read_run(directory: Path, order: list[str]) -> RunStatus:
    finished: dict[str, float] = {}
    for path in sorted((directory / "steps").glob("*.json"), key=lambda path: _rank(path.stem, order)):
        try:
            finished[path.stem] = float(json.loads(path.read_text())["seconds"])
        except (ValueError, KeyError, TypeError, OSError):
            continue  # no finished step: removed meanwhile, or not written by a step
    metrics = last_metrics(directory / "train" / "metrics.jsonl") or {}
    checkpoints = (directory / "train" / "checkpoints").glob(f"step_*/{MARKER}")
    # By number: past step 999,999 the names are longer.
    committed = sorted((path.parent.name for path in checkpoints), key=lambda name: (len(name), name))
    return RunStatus(
        name=directory.name,
        directory=directory,
        finished=finished,
        step=metrics.get("step"),
        steps_total=metrics.get("steps"),
        loss=metrics.get("loss"),
        seconds_left=metrics.get("seconds_left"),
        checkpoint=committed[-1] if committed else None,
        processes=len(_processes(directory)),
    )


def _rank(step: str, order: list[str]) -> int:
    return order.index(step) if step in order else len(order)


def _processes(directory: Path) -> set[int]:
    """Process ids that the run's own records lead to; whoever only reads its files is not among them."""
    found: set[int] = set()
    for name in ("lease.json", "program.json"):
        try:
            record = json.loads((directory / name).read_text())
            if record.get("host", socket.gethostname()) != socket.gethostname():
                continue
            if is_alive(record["pid"], record["created"]):
                root = psutil.Process(record["pid"])
                found |= {root.pid, *(child.pid for child in root.children(recursive=True))}
        except (OSError, ValueError, KeyError, psutil.NoSuchProcess):
            continue  # given back meanwhile, or its process is gone
    return found
