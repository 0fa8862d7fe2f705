"""Owns what makes a step a step: its fingerprint, its record on disk, its MLflow run, and the events a terminal shows.

It knows nothing of what the steps compute. Same inputs, same output: found and reused.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from prefect import get_run_logger

from base import storage
from base.errors import CherryError, is_retryable_exit_code
from cherry import __version__
from tasks.process import append_whole, in_background, run_command, run_module
from tasks.run_config import RunConfig
from tasks.tracking.mlflow_tracker import MlflowTracker, connect
from tasks.tracking.protocol import Tracker

# Steps that need the model registry wait for a server that is started again; the others do without it.
REGISTRY_DELAYS_S = [2.0, 10.0, 30.0]
# In the run directory, while a program of a step runs: its pid and when it was started.
PROGRAM = "program.json"


@dataclass(frozen=True)
class RunContext:
    """What every task of one run is given: plain values, so that it passes through any task runner."""

    directory: str
    config: RunConfig
    parent_run_id: str | None = None
    """MLflow run of the flow; `None` when the tracking server could not be reached."""
    began: float = field(default_factory=time.time)
    """Unix time at which the flow began."""

    @property
    def path(self) -> Path:
        """The run directory."""
        return Path(self.directory)

    @property
    def key(self) -> str:
        """What tells this run directory from every other one of the same name."""
        return run_key(self.path)

    def tracker(self) -> MlflowTracker:
        """The run's tracker; never raises because a server is down."""
        return connect(self.config.tracking, self.config.runs_directory)


def run_key(run_directory: Path) -> str:
    """What tells this run directory from every other one of the same name; made on the first call."""
    path = run_directory / "run_key"
    if not path.exists():
        storage.write_bytes(str(path), uuid.uuid4().hex.encode())
    return path.read_text()


@dataclass(frozen=True)
class StepRecord:
    """A finished step, as steps/<step>.json keeps it."""

    step: str
    fingerprint: str
    outputs: dict[str, str]
    """Directories or files by name; directories are committed."""
    figures: dict[str, Any]
    seconds: float
    finished_at: float
    mlflow_run_id: str | None
    mlflow_parent_run_id: str | None
    reused: bool = False


@dataclass
class StepRun:
    """A step while it works: where it reports to."""

    context: RunContext
    step: str
    fingerprint: str
    run_id: str | None
    tracker: Tracker
    figures: dict[str, Any] = field(default_factory=dict)

    def say(self, line: str, fraction: float | None = None) -> None:
        """A line for the Prefect log and the terminal."""
        get_run_logger().info(line)
        self.show(line, fraction)

    def show(self, line: str, fraction: float | None = None) -> None:
        """A line for the terminal alone: what comes often costs Prefect's server as much as it costs a small model."""
        write_event(self.context.path, self.step, "progress", line=line, fraction=fraction)

    def run(
        self,
        module: str,
        arguments: Sequence[str],
        *,
        on_line: Callable[[str], None] | None = None,
        log_file: Path | None = None,
    ) -> None:
        """Run a program to its end, its lines said; program.json names it, for a clean-up by another process.

        Raises:
            CherryError: the program's own.
        """
        record_file = self.context.path / PROGRAM
        run_module(module, arguments, on_line=on_line or self.say, log_file=log_file, record_file=record_file)

    def run_command(self, command: Sequence[str], *, name: str, on_line: Callable[[str], None], log_file: Path) -> None:
        """Run a command to its end, as `run` does a module.

        Raises:
            CherryError: the program's own.
        """
        record_file = self.context.path / PROGRAM
        run_command(command, name=name, on_line=on_line, log_file=log_file, record_file=record_file)

    def metrics(self, **values: float) -> None:
        """Figures of this step: into its MLflow run and its record."""
        self.figures.update(values)
        self.tracker.log(self.run_id, metrics=values)


def perform(
    context: RunContext,
    step: str,
    inputs: Mapping[str, Any],
    work: Callable[[StepRun], Mapping[str, str]],
    *,
    began: float | None = None,
) -> StepRecord:
    """Do a step, or find it done.

    Args:
        inputs: everything that its output depends on, as JSON values.
        work: does it, and returns its outputs by name.
        began: unix time from which its seconds count, when tasks before this one belong to it.
    """
    identity = storage.fingerprint({"step": step, "inputs": inputs, "version": __version__})
    found = find_finished(context.path, step, identity)
    if found is not None:
        get_run_logger().info("found finished: %s (%s)", step, ", ".join(found.outputs.values()) or "no output")
        write_event(context.path, step, "reused", seconds=found.seconds)
        return found
    if began is None:  # else whoever began has said so
        write_event(context.path, step, "started")
    tracker = context.tracker()
    name = f"{context.config.name}-{step}"
    run_id = tracker.start(name, parent=context.parent_run_id, step=step, identity=identity, run_key=context.key)
    running = StepRun(context, step, identity, run_id, tracker)
    started = time.time() if began is None else began
    with _watched(running), _system_metrics(running):
        tracker.log(run_id, params=flatten(inputs))
        outputs = dict(work(running))
    record = StepRecord(
        step, identity, outputs, running.figures, time.time() - started, time.time(), run_id, context.parent_run_id
    )
    write_record(context.path, record)
    write_event(context.path, step, "finished", seconds=record.seconds)
    return record


@contextmanager
def _watched(running: StepRun) -> Iterator[None]:
    """Close the step's MLflow run as what became of it, and tell the terminal of a failure."""
    status = "FINISHED"
    try:
        yield
    except BaseException as error:
        # A cancellation and Ctrl-C are no Exceptions.
        status = "FAILED" if isinstance(error, Exception) else "KILLED"
        line = str(error) if isinstance(error, CherryError) else f"{type(error).__name__}: {error}"
        write_event(running.context.path, running.step, "failed", line=line)
        raise
    finally:
        running.tracker.finish(running.run_id, status)


@contextmanager
def _system_metrics(running: StepRun) -> Iterator[None]:
    """Follow this node beside the step: its processors, memory, disk and GPUs."""
    stop = None
    if running.context.config.tracking.system_metrics:
        with in_background():
            stop = running.context.tracker().system_metrics(running.run_id)
    try:
        yield
    finally:
        if stop is not None:
            stop()


def write_record(run_directory: Path, record: StepRecord) -> None:
    """Write steps/<step>.json."""
    storage.write_json(str(run_directory / "steps" / f"{record.step}.json"), asdict(record))


def find_finished(run_directory: Path, step: str, identity: str | None = None) -> StepRecord | None:
    """The record of a finished step whose outputs are still valid, with this fingerprint if one is given."""
    path = run_directory / "steps" / f"{step}.json"
    if not path.exists():
        return None
    record = StepRecord(**{**storage.read_json(str(path)), "reused": True})
    if identity is not None and record.fingerprint != identity:
        return None
    for output in record.outputs.values():
        valid = storage.is_committed(output) if Path(output).is_dir() else storage.exists(output)
        if not valid:
            return None
    return record


def put_aside(folder: Path, identity: str) -> Path:
    """Move an output that other inputs made to `<folder>.<fingerprint>`: what was saved is never deleted here."""
    target = _aside(folder, identity)
    number = 1
    while target.exists():
        number += 1
        target = _aside(folder, identity).with_name(f"{_aside(folder, identity).name}.{number}")
    folder.rename(target)
    get_run_logger().info("another config made %s: it is now %s", folder, target)
    return target


def make_room(context: RunContext, step: str, folder: Path, identity: str) -> None:
    """Put aside the finished output of `step` in `folder` unless these inputs made it."""
    path = context.path / "steps" / f"{step}.json"
    owner = storage.read_json(str(path))["fingerprint"] if path.exists() else None
    if owner not in (None, identity) and storage.is_committed(str(folder)):
        put_aside(folder, owner)


def find_output(uri: str, identity: str) -> str:
    """Where an output lies that was at `uri` when `identity` made it: there, or put aside."""
    if storage.is_local(uri) and _aside(Path(uri), identity).is_dir():
        return str(_aside(Path(uri), identity))
    return uri


def _aside(folder: Path, identity: str) -> Path:
    return folder.with_name(f"{folder.name}.{identity[:8]}")


def write_event(run_directory: Path, step: str, event: str, **details: Any) -> None:
    """Append to events.jsonl, which the terminal's progress display reads; an event that storage refuses is dropped.

    A full disk must not end the step that tells how far it is.
    """
    line = json.dumps({"time": time.time(), "step": step, "event": event, **details}) + "\n"
    append_whole(run_directory / "events.jsonl", line)


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values with dotted keys, as MLflow shows parameters."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def sections(config: RunConfig, names: Sequence[str]) -> dict[str, Any]:
    """Some sections of the config as JSON values: what a step's fingerprint is made of."""
    return {name: value for name, value in config.model_dump(mode="json").items() if name in names}


def worth_retrying(_task: Any, _task_run: Any, state: Any) -> bool:
    """Prefect's retry condition: the world's fault may pass, every other one is met again."""
    try:
        state.result()
    except CherryError as error:
        return is_retryable_exit_code(error.exit_code)
    except Exception:
        return False  # a bug of ours
    return True
