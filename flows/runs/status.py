"""The state of run directories, read from disk only.

It asks no server, so it answers when Prefect and the tracker are down.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import psutil

from base.json_lines import as_record
from flows.runs.directories import find_run, run_directories
from tasks.interruptions.position import last_checkpoint, last_metrics
from tasks.lease import RENEW_S
from tasks.lifecycle import STEPS, TRAIN_STEPS
from tasks.processes.process import Pid, is_alive
from tasks.processes.replicas import Server, ServingDirectory
from tasks.records.events import Event, last_event

State = Literal["running", "waiting", "finished", "failed", "interrupted"]
"""`waiting` is between two attempts of a step, or not begun; `interrupted` was stopped or killed and can be resumed."""
_R = TypeVar("_R")
# A lease of another host that was not renewed for so long is that of a host that is gone.
_STALE_S = 8 * RENEW_S


@dataclass(frozen=True)
class _Process:
    """Process of a lease or of a step's program."""

    pid: Pid
    created: float
    host: str | None = None

    @property
    def is_elsewhere(self) -> bool:
        return self.host not in (None, socket.gethostname())


@dataclass(frozen=True)
class _Finished:
    """What counts of a finished step's record."""

    seconds: float


@dataclass(frozen=True)
class _Evaluation:
    """What is shown of evaluation.json."""

    verdict: str | None = None
    reason: str | None = None
    bits_per_byte: float | None = None


@dataclass(frozen=True)
class _Registered:
    """What is shown of register.json."""

    name: str | None = None
    version: int | None = None
    champion_reason: str | None = None


@dataclass(frozen=True)
class _Trained:
    """What is shown of training's result.json."""

    changes: tuple[str, ...] | None = None


@dataclass(frozen=True)
class RunStatus:
    """State of one run directory. `loss`, `step` and `steps_total` are those of the newest logged training step."""

    name: str
    directory: Path
    state: State
    changed_at: float
    """Unix time of the newest event; of the config where there is none."""
    finished: dict[str, float] = field(default_factory=dict)
    """Seconds by finished step, in the order of the run."""
    working_on: str | None = None
    """Step of the newest event, unless that finished it."""
    step: int | None = None
    steps_total: int | None = None
    loss: float | None = None
    seconds_left: float | None = None
    checkpoint: str | None = None
    """Name of the newest committed checkpoint."""
    verdict: str | None = None
    reason: str | None = None
    champion_reason: str | None = None
    """Why the version did not become the champion when it was registered; `None` if it did, or is not registered."""
    heldout_bits_per_byte: float | None = None
    changes: tuple[str, ...] = ()
    """What training resumed with that it did not begin with, in words."""
    model: str | None = None
    """Name of the registered model."""
    version: int | None = None
    served: tuple[str, ...] = ()
    """Live servers of its weights: version and share of the traffic."""
    processes: int = 0
    """Live processes on this host: the one that holds the lease, its step's program, and their descendants."""


def read_runs(runs_directory: Path) -> list[RunStatus]:
    """The status of every run in `runs_directory`, newest first; empty when there is none."""
    servers, weights = _serving(runs_directory)
    return [_read_run(directory, servers, weights) for directory in run_directories(runs_directory)]


def read_run(runs_directory: Path, name: str) -> RunStatus:
    """The status of one run.

    Raises:
        MissingFileError: see `flows.runs.directories.find_run`.
    """
    return _read_run(find_run(runs_directory, name), *_serving(runs_directory))


def is_held(directory: Path) -> bool:
    """Whether a live process works on the run, as far as can be told without writing."""
    lease = as_record(_Process, read_values(directory / "lease.json"))
    stat = _stat(directory / "lease.json")
    if lease is None or stat is None:
        return False
    if lease.is_elsewhere:
        return time.time() - stat.st_mtime < _STALE_S
    return is_alive(lease.pid, lease.created)


def read_values(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty when there is none, or when it is damaged."""
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def served_from(directory: Path) -> list[Server]:
    """Live servers of weights in the run directory."""
    servers, _ = _serving(directory.parent)
    return [server for server in servers if _is_inside(server.model, directory)]


def _read_run(directory: Path, servers: list[Server], weights: Mapping[str, float]) -> RunStatus:
    finished = _finished(directory)
    metrics = last_metrics(directory / "train" / "metrics.jsonl")
    event = last_event(directory, lambda event: event.step in TRAIN_STEPS)
    evaluation = _read(_Evaluation, directory / "evaluate" / "evaluation.json", "evaluate" in finished)
    registered = _read(_Registered, directory / "register.json", "register" in finished)
    trained = _read(_Trained, directory / "train" / "result.json")
    stat = _stat(directory / "config.yaml")
    own = [server for server in servers if _is_inside(server.model, directory)]
    return RunStatus(
        name=directory.name,
        directory=directory,
        state=_state(directory, finished, event),
        changed_at=(0.0 if event is None else event.time) or (0.0 if stat is None else stat.st_mtime),
        finished=finished,
        working_on=event.step if event is not None and event.event not in ("finished", "reused") else None,
        step=None if metrics is None else metrics.step,
        steps_total=None if metrics is None else metrics.steps,
        loss=None if metrics is None else metrics.loss,
        seconds_left=None if metrics is None else metrics.seconds_left,
        checkpoint=last_checkpoint(directory),
        verdict=evaluation.verdict,
        reason=evaluation.reason,
        champion_reason=registered.champion_reason,
        heldout_bits_per_byte=evaluation.bits_per_byte,
        changes=trained.changes or (),
        model=registered.name,
        version=registered.version,
        served=tuple(f"{server.version} {weights.get(server.name, 0.0):g} %" for server in own),
        processes=len(_processes(directory)),
    )


def _read(kind: type[_R], path: Path, exists: bool = True) -> _R:
    """The record of a file; that without any value when there is none, or when it is damaged."""
    return (as_record(kind, read_values(path)) if exists else None) or kind()


def _state(directory: Path, finished: Mapping[str, float], event: Event | None) -> State:
    failed = event if event is not None and event.event == "failed" else None
    if is_held(directory):
        return "waiting" if failed is not None else "running"
    if failed is not None:
        return "interrupted" if failed.interrupted or failed.line == "interrupted" else "failed"
    if set(TRAIN_STEPS) <= finished.keys():
        return "finished"
    return "waiting" if event is None else "interrupted"


def _finished(directory: Path) -> dict[str, float]:
    finished: dict[str, float] = {}
    for path in sorted((directory / "steps").glob("*.json"), key=lambda path: _rank(path.stem)):
        record = as_record(_Finished, read_values(path))
        if record is not None:  # else it was removed meanwhile, is damaged, or no step wrote it
            finished[path.stem] = record.seconds
    return finished


def _rank(step: str) -> int:
    return STEPS.index(step) if step in STEPS else len(STEPS)


def _serving(runs_directory: Path) -> tuple[list[Server], dict[str, float]]:
    """Live servers of a runs directory, and their shares of the traffic by name."""
    serving = ServingDirectory(str(runs_directory))
    return [server for server in serving.servers() if server.alive], serving.weights()


def _is_inside(path: str, directory: Path) -> bool:
    return bool(path) and Path(path).absolute().is_relative_to(directory.absolute())


def _processes(directory: Path) -> set[int]:
    """Ids of the live processes in the run's lease and program records, with their descendants."""
    found: set[int] = set()
    for name in ("lease.json", "program.json"):
        record = as_record(_Process, read_values(directory / name))
        if record is None or record.is_elsewhere or not is_alive(record.pid, record.created):
            continue
        try:
            root = psutil.Process(record.pid)
            found |= {root.pid, *(child.pid for child in root.children(recursive=True))}
        except psutil.NoSuchProcess:
            continue  # it has just ended
    return found


def _stat(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except OSError:  # removed meanwhile
        return None
