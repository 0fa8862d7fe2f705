"""Pipeline steps: fingerprint, record on disk, run in the tracker, and the events that the terminal shows.

A step with the same inputs and the same code is not run again: its output is found and reused.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from base import storage
from base.errors import CherryError, is_retryable_exit_code
from base.json_lines import append_json
from cherry import __version__
from tasks.code_version import step_digest
from tasks.processes.process import in_background, run_command, run_module
from tasks.run_config import RunConfig
from tasks.run_logger import run_logger
from tasks.tracking.connect import connect
from tasks.tracking.protocol import RunStatus, RunTracker, Tracker

# Steps that need the model registry wait for its server to be started again; the others do without it.
REGISTRY_DELAYS_S = [2.0, 10.0, 30.0]
EVENTS_FILE = "events.jsonl"
PROGRAM = "program.json"
"""File in the run directory while a program of a step runs: its pid and start time."""
# Keys of step records, by the name that files of earlier versions have for them.
_RENAMED_KEYS = {"mlflow_run_id": "run_id", "mlflow_parent_run_id": "parent_run_id"}


@dataclass(frozen=True)
class RunContext:
    """Context that every task of a run gets: plain values, which any task runner can serialize."""

    directory: str
    config: RunConfig
    parent_run_id: str | None = None
    """The flow's run in the tracker; `None` when the tracker could not be reached."""
    began: float = field(default_factory=time.time)
    """Unix time of the flow's start."""

    @property
    def path(self) -> Path:
        """The run directory."""
        return Path(self.directory)

    @property
    def key(self) -> str:
        """Random id of this run directory, which no other one of the same name has; made on the first call."""
        return run_key(self.path)

    def tracker(self) -> Tracker:
        """The tracker that the config names; no server is asked yet."""
        return connect(self.config.tracking, self.config.runs_directory)


def run_key(run_directory: Path) -> str:
    """Random id that distinguishes this run directory from others of the same name; made on the first call."""
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
    run_id: str | None
    """Id of the step's run in the tracker; `None` when it could not be reached."""
    parent_run_id: str | None
    """Id of the flow's run in the tracker."""
    reused: bool = False
    inputs_fingerprint: str = ""
    """Fingerprint of the inputs without the code; empty in records of earlier versions."""


@dataclass
class StepRun:
    """A running step: it reports progress and figures, and runs the step's programs."""

    context: RunContext
    step: str
    fingerprint: str
    """Fingerprint of the step's inputs and the code that computes it."""
    run_id: str | None
    tracker: RunTracker
    inputs_fingerprint: str = ""
    """Fingerprint of its inputs without the code."""
    figures: dict[str, Any] = field(default_factory=dict)

    def say(self, line: str, fraction: float | None = None) -> None:
        """Report a line to the run's log and the terminal; `fraction` is how much of the step is done."""
        run_logger().info(line)
        self.show(line, fraction)

    def show(self, line: str, fraction: float | None = None) -> None:
        """Report a line to the terminal only: each line in the log is a request to Prefect's server."""
        write_event(self.context.path, self.step, "progress", line=line, fraction=fraction)

    def run(
        self,
        module: str,
        arguments: Sequence[str],
        *,
        on_line: Callable[[str], None] | None = None,
        on_progress: Callable[[str, float], None] | None = None,
        log_file: Path | None = None,
    ) -> None:
        """Run a program to its end and report its lines and its progress; see `tasks.processes.process.run_module`.

        program.json names the program while it runs, for a clean-up by another process.

        Raises:
            CherryError: the program's own.
        """
        run_module(
            module,
            arguments,
            on_line=on_line or self.say,
            on_progress=on_progress or self.say,
            log_file=log_file,
            record_file=self.context.path / PROGRAM,
        )

    def run_command(
        self, command: Sequence[str], *, name: str, on_progress: Callable[[str, float], None], log_file: Path
    ) -> None:
        """Run a command to its end, as `run` does a module.

        Raises:
            CherryError: the program's own.
        """
        run_command(
            command,
            name=name,
            on_line=self.say,
            on_progress=on_progress,
            log_file=log_file,
            record_file=self.context.path / PROGRAM,
        )

    def metrics(self, **values: float) -> None:
        """Record figures of this step, in its run in the tracker and in its record on disk."""
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
    """Record of a step, which is run unless its output is found finished.

    Args:
        inputs: everything but the code that its output depends on, as JSON values.
        work: computes the outputs and returns them by name.
        began: unix time from which its seconds count, when tasks before this one belong to it.
    """
    inputs_fingerprint = storage.fingerprint({"step": step, "inputs": inputs, "version": __version__})
    identity = storage.fingerprint([inputs_fingerprint, step_digest(step)])
    found = find_finished(context.path, step, identity)
    if found is not None:
        run_logger().info("found finished: %s (%s)", step, ", ".join(found.outputs.values()) or "no output")
        write_event(context.path, step, "reused", seconds=found.seconds)
        return found
    if began is None:  # else the task that began has reported it
        write_event(context.path, step, "started")
    tracker = context.tracker().runs
    name = f"{context.config.name}-{step}"
    run_id = tracker.start(name, parent=context.parent_run_id, step=step, identity=identity, run_key=context.key)
    running = StepRun(context, step, identity, run_id, tracker, inputs_fingerprint)
    started = time.time() if began is None else began
    with _watched(running), _system_metrics(running):
        tracker.log(run_id, params=flatten(inputs))
        outputs = dict(work(running))
    record = StepRecord(
        step=step,
        fingerprint=identity,
        outputs=outputs,
        figures=running.figures,
        seconds=time.time() - started,
        finished_at=time.time(),
        run_id=run_id,
        parent_run_id=context.parent_run_id,
        inputs_fingerprint=inputs_fingerprint,
    )
    write_record(context.path, record)
    write_event(context.path, step, "finished", seconds=record.seconds)
    return record


@contextmanager
def _watched(running: StepRun) -> Iterator[None]:
    """Close the step's run in the tracker with its status, and report a failure to the terminal."""
    status: RunStatus = "FINISHED"
    try:
        yield
    except BaseException as error:
        # A cancellation and Ctrl-C are BaseExceptions.
        status = "FAILED" if isinstance(error, Exception) else "KILLED"
        line = _line_of(error)
        write_event(running.context.path, running.step, "failed", line=line)
        raise
    finally:
        running.tracker.finish(running.run_id, status)


@contextmanager
def _system_metrics(running: StepRun) -> Iterator[None]:
    """Record the node's processor, memory, disk and GPU use while the step runs."""
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
    """Write a step's record to steps/<step>.json."""
    storage.write_json(str(run_directory / "steps" / f"{record.step}.json"), asdict(record))


def read_record(path: Path) -> StepRecord:
    """The record in a steps/<step>.json of this or an earlier version."""
    stored = {_RENAMED_KEYS.get(key, key): value for key, value in storage.read_json(str(path)).items()}
    return StepRecord(**{**stored, "reused": True})


def find_finished(run_directory: Path, step: str, identity: str | None = None) -> StepRecord | None:
    """The record of a finished step whose outputs are valid; `None` if there is none or its fingerprint differs."""
    path = run_directory / "steps" / f"{step}.json"
    if not path.exists():
        return None
    record = read_record(path)
    if identity is not None and record.fingerprint != identity:
        return None
    for output in record.outputs.values():
        valid = storage.is_committed(output) if Path(output).is_dir() else storage.exists(output)
        if not valid:
            return None
    return record


def move_aside(folder: Path, identity: str) -> Path:
    """Path `<folder>.<fingerprint>` to which an output of other inputs or other code is moved; nothing is deleted."""
    target = _aside(folder, identity)
    number = 1
    while target.exists():
        number += 1
        target = _aside(folder, identity).with_name(f"{_aside(folder, identity).name}.{number}")
    folder.rename(target)
    run_logger().info("%s is of another config or other code: moved to %s", folder, target)
    return target


def make_room(context: RunContext, step: str, folder: Path, identity: str) -> None:
    """Move the finished output of `step` in `folder` aside unless it has this fingerprint."""
    path = context.path / "steps" / f"{step}.json"
    owner = storage.read_json(str(path))["fingerprint"] if path.exists() else None
    if owner not in (None, identity) and storage.is_committed(str(folder)):
        move_aside(folder, owner)


def _line_of(error: BaseException) -> str:
    """What the terminal shows of an error that ended a step."""
    if isinstance(error, CherryError):
        return str(error)
    return "interrupted" if isinstance(error, KeyboardInterrupt) else f"{type(error).__name__}: {error}"


def find_output(uri: str, identity: str) -> str:
    """URI of the output that a step with this fingerprint wrote to `uri`: there, or where it was moved since."""
    if storage.is_local(uri) and _aside(Path(uri), identity).is_dir():
        return str(_aside(Path(uri), identity))
    return uri


def _aside(folder: Path, identity: str) -> Path:
    return folder.with_name(f"{folder.name}.{identity[:8]}")


def write_event(run_directory: Path, step: str, event: str, **details: Any) -> None:
    """Append an event to events.jsonl, which the terminal's progress display reads; best effort, see `append_json`."""
    append_json(run_directory / EVENTS_FILE, {"time": time.time(), "step": step, "event": event, **details})


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values with dotted keys, as trackers show parameters."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def sections(config: RunConfig, names: Sequence[str]) -> dict[str, Any]:
    """Sections of the config as JSON values, by name: a step's inputs."""
    return {name: value for name, value in config.model_dump(mode="json").items() if name in names}


def worth_retrying(_task: Any, _task_run: Any, state: Any) -> bool:
    """Prefect's retry condition: only transient errors are retried."""
    try:
        state.result()
    except CherryError as error:
        return is_retryable_exit_code(error.exit_code)
    except Exception:
        return False  # a bug
    return True
