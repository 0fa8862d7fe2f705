"""`cherry status`: the state of every run directory, read from disk only.

It asks no server, so it answers when Prefect and the tracker are down.
"""

from __future__ import annotations

import json
import socket
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from base.json_lines import read_last
from base.storage import MARKER
from cherry.train_record import TrainRecord
from tasks.processes.process import is_alive


@dataclass(frozen=True)
class RunStatus:
    """State of one run directory. `loss`, `step` and `steps_total` are those of the newest logged training step."""

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
    """Live processes on this host: the one that holds the lease, its step's program, and their descendants."""


def read_runs(runs_directory: Path, order: list[str]) -> list[RunStatus]:
    """The status of every run in `runs_directory`, newest first; empty when there is none."""
    if not runs_directory.is_dir():
        return []
    directories = [path.parent for path in runs_directory.glob("*/config.yaml")]
    directories.sort(key=lambda path: (path / "config.yaml").stat().st_mtime, reverse=True)
    return [_read_run(directory, order) for directory in directories]


def last_metrics(metrics_file: Path) -> TrainRecord | None:
    """The record of the newest logged training step; a line that is still being written is skipped."""
    line = read_last(metrics_file, "step")
    return None if line is None else TrainRecord.from_line(line)


def _read_run(directory: Path, order: list[str]) -> RunStatus:
    finished: dict[str, float] = {}
    for path in sorted((directory / "steps").glob("*.json"), key=lambda path: _rank(path.stem, order)):
        try:
            finished[path.stem] = float(json.loads(path.read_text())["seconds"])
        except (ValueError, KeyError, TypeError, OSError):
            continue  # no finished step: removed meanwhile, or not written by a step
    metrics = last_metrics(directory / "train" / "metrics.jsonl")
    checkpoints = (directory / "train" / "checkpoints").glob(f"step_*/{MARKER}")
    # By number: past step 999,999 the names are longer.
    committed = sorted((path.parent.name for path in checkpoints), key=lambda name: (len(name), name))
    return RunStatus(
        name=directory.name,
        directory=directory,
        finished=finished,
        step=None if metrics is None else metrics.step,
        steps_total=None if metrics is None else metrics.steps,
        loss=None if metrics is None else metrics.loss,
        seconds_left=None if metrics is None else metrics.seconds_left,
        checkpoint=committed[-1] if committed else None,
        processes=len(_processes(directory)),
    )


def _rank(step: str, order: list[str]) -> int:
    return order.index(step) if step in order else len(order)


def _processes(directory: Path) -> set[int]:
    """Ids of the live processes in the run's lease and program records, with their descendants."""
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
            continue  # released meanwhile, or its process is gone
    return found
