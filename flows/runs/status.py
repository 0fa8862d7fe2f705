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
from typing import Any, Literal

import psutil

from base.json_lines import read_last
from flows.runs.directories import find_run, run_directories
from tasks.interruptions.position import last_checkpoint, last_metrics
from tasks.lease import RENEW_S
from tasks.lifecycle import STEPS, TRAIN_STEPS
from tasks.processes.process import is_alive
from tasks.processes.replicas import Server, ServingDirectory
from tasks.records.events import EVENTS_FILE

State = Literal["running", "waiting", "finished", "failed", "interrupted"]
"""`waiting` is between two attempts of a step, or not begun; `interrupted` was stopped or killed and can be resumed."""
# A lease of another host that was not renewed for so long is that of a host that is gone.
_STALE_S = 8 * RENEW_S


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
    lease = read_values(directory / "lease.json")
    stat = _stat(directory / "lease.json")
    if not lease or stat is None:
        return False
    if lease.get("host", socket.gethostname()) != socket.gethostname():
        return time.time() - stat.st_mtime < _STALE_S
    return _is_alive(lease)


def read_values(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty when there is none, or when it is damaged."""
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def served_from(directory: Path) -> list[Server]:
    """Live servers of weights in the run directory."""
    servers, _ = _serving(directory.parent)
    return [server for server in servers if _is_inside(server.model, directory)]


def _read_run(directory: Path, servers: list[Server], weights: Mapping[str, float]) -> RunStatus:
    finished = _finished(directory)
    metrics = last_metrics(directory / "train" / "metrics.jsonl")
    event = read_last(directory / EVENTS_FILE, "event", accept=lambda event: event.get("step") in TRAIN_STEPS) or {}
    evaluation = read_values(directory / "evaluate" / "evaluation.json") if "evaluate" in finished else {}
    registered = read_values(directory / "register.json") if "register" in finished else {}
    trained = read_values(directory / "train" / "result.json")
    stat = _stat(directory / "config.yaml")
    own = [server for server in servers if _is_inside(server.model, directory)]
    return RunStatus(
        name=directory.name,
        directory=directory,
        state=_state(directory, finished, event),
        changed_at=float(event.get("time") or (0.0 if stat is None else stat.st_mtime)),
        finished=finished,
        working_on=str(event["step"]) if event and event["event"] not in ("finished", "reused") else None,
        step=None if metrics is None else metrics.step,
        steps_total=None if metrics is None else metrics.steps,
        loss=None if metrics is None else metrics.loss,
        seconds_left=None if metrics is None else metrics.seconds_left,
        checkpoint=last_checkpoint(directory),
        verdict=evaluation.get("verdict"),
        reason=evaluation.get("reason"),
        champion_reason=registered.get("champion_reason"),
        heldout_bits_per_byte=evaluation.get("bits_per_byte"),
        changes=tuple(map(str, trained.get("changes") or ())),
        model=registered.get("name"),
        version=registered.get("version"),
        served=tuple(f"{server.version} {weights.get(server.name, 0.0):g} %" for server in own),
        processes=len(_processes(directory)),
    )


def _state(directory: Path, finished: Mapping[str, float], event: Mapping[str, Any]) -> State:
    failed = event.get("event") == "failed"
    if is_held(directory):
        return "waiting" if failed else "running"
    if failed:
        return "interrupted" if event.get("interrupted") or event.get("line") == "interrupted" else "failed"
    if set(TRAIN_STEPS) <= finished.keys():
        return "finished"
    return "interrupted" if event else "waiting"


def _finished(directory: Path) -> dict[str, float]:
    finished: dict[str, float] = {}
    for path in sorted((directory / "steps").glob("*.json"), key=lambda path: _rank(path.stem)):
        try:
            finished[path.stem] = float(read_values(path)["seconds"])
        except (ValueError, KeyError, TypeError):
            continue  # no finished step: removed meanwhile, or not written by a step
    return finished


def _rank(step: str) -> int:
    return STEPS.index(step) if step in STEPS else len(STEPS)


def _serving(runs_directory: Path) -> tuple[list[Server], dict[str, float]]:
    """Live servers of a runs directory, and their shares of the traffic by name."""
    serving = ServingDirectory(str(runs_directory))
    return [server for server in serving.servers() if server.alive], serving.weights()


def _is_inside(path: str, directory: Path) -> bool:
    return bool(path) and Path(path).absolute().is_relative_to(directory.absolute())


def _is_alive(record: Mapping[str, Any]) -> bool:
    try:
        return is_alive(int(record["pid"]), float(record["created"]))
    except (KeyError, TypeError, ValueError):
        return False


def _processes(directory: Path) -> set[int]:
    """Ids of the live processes in the run's lease and program records, with their descendants."""
    found: set[int] = set()
    for name in ("lease.json", "program.json"):
        record = read_values(directory / name)
        if record.get("host", socket.gethostname()) != socket.gethostname() or not _is_alive(record):
            continue
        try:
            root = psutil.Process(record["pid"])
            found |= {root.pid, *(child.pid for child in root.children(recursive=True))}
        except psutil.NoSuchProcess:
            continue  # it has just ended
    return found


def _stat(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except OSError:  # removed meanwhile
        return None
