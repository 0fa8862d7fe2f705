"""Pipeline steps: fingerprint, record on disk, run in the tracker, and the events that the terminal shows.

A step with the same inputs and the same code is not run again: its output is found and reused, as long as every file
of it is as the step left it. What was lost is made again.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from base import storage
from base.errors import CherryError, is_retryable_exit_code
from cherry import __version__
from tasks.code_version import step_digest
from tasks.files.outputs import aside_path, clear_damage, damages, file_states, found_paths, set_aside, stored_paths
from tasks.files.places import staying
from tasks.processes.process import in_background, run_command, run_module
from tasks.records.environment import cost_figures, device_of
from tasks.records.events import line_of, now, write_event, write_log
from tasks.records.figures import tracked
from tasks.run_config import RunConfig
from tasks.run_logger import run_logger
from tasks.tracking.connect import connect
from tasks.tracking.protocol import RunStatus, RunTracker, Tracker

# Steps that need the model registry wait for its server to be started again; the others do without it.
REGISTRY_DELAYS_S = [2.0, 10.0, 30.0]
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
    dry_run: bool = False
    """Only ask which steps are finished: `perform` runs and writes nothing."""

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
    files: dict[str, list[Any]] = field(default_factory=dict)
    """[bytes, SHA-256] of the outputs that are files, by name; empty in records of earlier versions."""
    inputs: dict[str, Any] = field(default_factory=dict)
    """The inputs, with dotted keys; empty in records of earlier versions."""


class NotFinishedError(Exception):
    """A dry run came to a step that would run: the fingerprints and inputs that it would have."""

    def __init__(self, step: str, fingerprint: str, inputs_fingerprint: str, inputs: Mapping[str, Any]) -> None:
        super().__init__(step)
        self.step = step
        self.fingerprint = fingerprint
        self.inputs_fingerprint = inputs_fingerprint
        self.inputs = inputs


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
    outputs: dict[str, str] = field(default_factory=dict)
    """Directories or files by name, once they are made."""
    figures: dict[str, Any] = field(default_factory=dict)
    logged: bool = False
    """Whether this attempt has a line in the step's log."""

    def say(self, line: str, fraction: float | None = None, *, lasting: bool = False) -> None:
        """Report a line to the run's log and the terminal, where a `lasting` one stays when the next one comes.

        `fraction` is how much of the step is done.
        """
        run_logger().info(line)
        self.show(line, fraction, lasting=lasting)

    def show(self, line: str, fraction: float | None = None, *, lasting: bool = False) -> None:
        """Report a line to the terminal and the step's log file only: each in the run's is a request to a server."""
        if not self.logged:
            self.logged = True
            write_log(self.context.path, self.step, f"--- {self.step} began at {now()} ---")
        write_log(self.context.path, self.step, line)
        write_event(self.context.path, self.step, "progress", line=line, fraction=fraction, lasting=lasting)

    def run(
        self,
        module: str,
        arguments: Sequence[str],
        *,
        on_line: Callable[[str], None] | None = None,
        on_progress: Callable[[str, float], None] | None = None,
    ) -> None:
        """Run a program to its end and report its lines and its progress; see `tasks.processes.process.run_module`.

        program.json names the program while it runs, for a clean-up by another process.

        Raises:
            CherryError: the program's own.
        """
        record, told = self.context.path / PROGRAM, on_line or self.say
        run_module(module, arguments, on_line=told, on_progress=on_progress or self.say, record_file=record)

    def run_command(
        self,
        command: Sequence[str],
        *,
        name: str,
        on_line: Callable[[str], None],
        on_progress: Callable[[str, float], None],
        beside: Callable[[int, Path], AbstractContextManager[None]] | None,
        until: float | None,
    ) -> None:
        """Run a command to its end, as `run` does a module; see `tasks.processes.process.run_command`.

        Raises:
            CherryError: the program's own.
        """
        record = self.context.path / PROGRAM
        run_command(
            command,
            name=name,
            on_line=on_line,
            on_progress=on_progress,
            record_file=record,
            beside=beside,
            until=until,
        )

    def metrics(self, **values: float) -> None:
        """Record figures of this step, in its run in the tracker and in its record on disk."""
        self.figures.update(values)
        self.tracker.log(self.run_id, **tracked(values, self.step)._asdict())


def perform(
    context: RunContext,
    step: str,
    inputs: Mapping[str, Any],
    work: Callable[[StepRun], Mapping[str, str]],
) -> StepRecord:
    """Record of a step, which is run unless its output is found finished.

    Args:
        inputs: everything but the code that its output depends on, as JSON values.
        work: computes the outputs and returns them by name.

    Raises:
        NotFinishedError: in a dry run, the step is not finished.
    """
    inputs_fingerprint = storage.fingerprint({"step": step, "inputs": inputs, "version": __version__})
    identity = storage.fingerprint([inputs_fingerprint, step_digest(step)])
    found = find_finished(context.path, step, identity)
    if context.dry_run:
        if found is None:
            raise NotFinishedError(step, identity, inputs_fingerprint, inputs)
        return found
    if found is not None:
        run_logger().info("found finished: %s (%s)", step, ", ".join(found.outputs.values()) or "no output")
        write_event(context.path, step, "reused", seconds=found.seconds)
        _track_reused(context, found)
        return found
    with opened_step(context, step, inputs, identity, inputs_fingerprint) as running:
        _clear_damage(running)
        running.outputs = dict(work(running))
    return read_record(step_file(context.path, step), reused=False)


@contextmanager
def opened_step(
    context: RunContext, step: str, inputs: Mapping[str, Any], identity: str, inputs_fingerprint: str = ""
) -> Iterator[StepRun]:
    """Context of a running step: its run in the tracker ends with its error, or with its record.

    Its outputs are those that it has when the context is left.
    """
    write_event(context.path, step, "started")
    tracker, started = context.tracker().runs, time.time()
    name = f"{context.config.name}-{step}"
    run_id = tracker.start(name, parent=context.parent_run_id, step=step, identity=identity, run_key=context.key)
    running = StepRun(context, step, identity, run_id, tracker, inputs_fingerprint)
    with _watched(running), staying(context.path), _system_metrics(running):
        tracker.log(run_id, params=flatten(inputs), tags={"device": device_of(context.config)})
        yield running
        tracker.log(run_id, metrics=cost_figures(context.config, time.time() - started))
    record = StepRecord(
        step=step,
        fingerprint=identity,
        outputs=running.outputs,
        figures=running.figures,
        seconds=time.time() - started,
        finished_at=time.time(),
        run_id=run_id,
        parent_run_id=context.parent_run_id,
        inputs_fingerprint=inputs_fingerprint,
        files=file_states(running.outputs),
        inputs=flatten(inputs),
    )
    write_record(context.path, record)
    write_event(context.path, step, "finished", seconds=record.seconds)


def _track_reused(context: RunContext, found: StepRecord) -> None:
    """Record a found step under a flow's run that did not make it: a child with its datasets, models and figures."""
    if found.run_id is None or context.parent_run_id in (None, found.parent_run_id):
        return  # caught up at the flow's end, or there already
    tracker = context.tracker().runs
    child = tracker.start(
        f"{context.config.name}-{found.step}",
        parent=context.parent_run_id,
        step=found.step,
        identity=storage.fingerprint([found.fingerprint, context.parent_run_id]),
        run_key=context.key,
        reused=found.run_id,
    )
    tracker.finish(child, "FINISHED")


def _clear_damage(running: StepRun) -> None:
    """Report what this step's finished output has lost since, and make it count as not made."""
    record = _read_stored(running.context.path, running.step)
    if record is None or record.fingerprint != running.fingerprint:
        return
    for uri, damage in damages(record.outputs, record.files).items():
        kept = clear_damage(uri, damage)
        where = f"; what is there is kept in {kept}" if kept else ""
        running.say(f"{uri} is no longer as it was committed ({damage}), so it is made again{where}")


@contextmanager
def _watched(running: StepRun) -> Iterator[None]:
    """Close the step's run in the tracker with its status, and report a failure to the terminal."""
    status: RunStatus = "FINISHED"
    try:
        yield
    except BaseException as error:
        # A cancellation and Ctrl-C are BaseExceptions.
        status = "FAILED" if isinstance(error, Exception) else "KILLED"
        line = line_of(error)
        write_event(running.context.path, running.step, "failed", line=line, interrupted=status == "KILLED")
        running.tracker.log(running.run_id, note=f"The attempt of {now()} failed: {line}")
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
    """Write a step's record to steps/<step>.json; paths in the run directory are written relative to it."""
    stored = replace(record, outputs=stored_paths(run_directory, record.outputs))
    storage.write_json(str(step_file(run_directory, record.step)), asdict(stored))


def step_file(run_directory: Path, step: str) -> Path:
    """The file of a step's record."""
    return run_directory / "steps" / f"{step}.json"


def read_record(path: Path, *, reused: bool = True) -> StepRecord:
    """The record in <run directory>/steps/<step>.json of this or an earlier version."""
    stored = {_RENAMED_KEYS.get(key, key): value for key, value in storage.read_json(str(path)).items()}
    outputs = found_paths(path.parent.parent, stored["outputs"])
    return StepRecord(**{**stored, "outputs": outputs, "reused": reused})


def _read_stored(run_directory: Path, step: str) -> StepRecord | None:
    """The record of a step, whether its outputs are still there or not; `None` without a whole one."""
    path = step_file(run_directory, step)
    if not path.exists():
        return None
    try:
        return read_record(path)
    except (ValueError, TypeError, KeyError, AttributeError):
        run_logger().warning("%s is empty or cut short: the step does not count as finished", path)
        return None


def find_finished(run_directory: Path, step: str, identity: str | None = None) -> StepRecord | None:
    """The record of a finished step whose outputs are whole; `None` if there is none or its fingerprint differs."""
    record = _read_stored(run_directory, step)
    if record is None or identity not in (None, record.fingerprint) or damages(record.outputs, record.files):
        return None
    return record


def move_aside(folder: Path, identity: str) -> Path:
    """Path `<folder>.<fingerprint>` to which an output of other inputs or other code is moved; nothing is deleted."""
    target = set_aside(folder, aside_path(folder, identity).name)
    run_logger().info("%s is of another config or other code: moved to %s", folder, target)
    return target


def make_room(context: RunContext, step: str, folder: Path, identity: str) -> None:
    """Move the finished output of `step` in `folder` aside unless it has this fingerprint."""
    record = _read_stored(context.path, step)
    if record is not None and record.fingerprint != identity and storage.is_committed(str(folder)):
        move_aside(folder, record.fingerprint)


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
