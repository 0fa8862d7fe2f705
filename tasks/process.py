"""Owns programs that a task starts: their lines, their exit codes as errors, and that nothing of them stays behind.

It knows nothing of what the programs do; `in_background` is for what goes on beside them.
"""

from __future__ import annotations

import logging
import os
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

import base.errors
from base import storage
from base.errors import (
    CALLER_EXIT_CODES,
    CherryError,
    InvalidInputError,
    OperationalError,
    WorkerLostError,
    is_retryable_exit_code,
)
from tasks.programs import module_command, module_environment

logger = logging.getLogger(__name__)
# Prefect's worker gives a cancelled flow 30 s before SIGKILL; the launcher needs 10 s of them to end its ranks.
_TERMINATE_GRACE_S = 15.0
_STRAY_GRACE_S = 3.0
_KEPT_LINES = 40


def run_module(
    module: str,
    arguments: Sequence[str],
    *,
    on_line: Callable[[str], None],
    log_file: Path | None = None,
    record_file: Path | None = None,
) -> None:
    """Run `python -m module arguments` to its end; see `run_command`."""
    command = module_command(module, arguments)
    run_command(command, name=module, on_line=on_line, log_file=log_file, record_file=record_file)


def run_command(
    command: Sequence[str],
    *,
    name: str,
    on_line: Callable[[str], None],
    log_file: Path | None = None,
    record_file: Path | None = None,
) -> None:
    """Run a command to its end, with its output given line by line.

    Args:
        name: what an error without a text of its own calls it.
        log_file: every line is appended there too, as long as there is room.
        record_file: holds the program's pid while it runs, for a clean-up by another process.

    Raises:
        CherryError: the program's own error, by its exit code and its last `error:` text.
    """
    environment = {**module_environment(), "PYTHONUNBUFFERED": "1", "CHERRY_PARENT": str(os.getpid())}
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=environment,
        start_new_session=True,
    )
    root = psutil.Process(process.pid)
    lines: list[str] = []
    try:
        if record_file is not None:
            storage.write_json(str(record_file), {"pid": root.pid, "created": root.create_time()})
        assert process.stdout is not None
        for line in process.stdout:
            line = line.rstrip("\n")
            lines = [*lines[-_KEPT_LINES:], line]
            if log_file is not None:
                append_whole(log_file, line + "\n")
            on_line(line)
        code = process.wait()
    finally:
        # Also reached by Prefect's TerminationSignal, which is a BaseException.
        end_tree(root)
        process.wait()
        if process.stdout is not None:
            process.stdout.close()
        if record_file is not None:
            record_file.unlink(missing_ok=True)
    if code:
        raise error_of(code, lines, name)


@contextmanager
def in_background() -> Iterator[None]:
    """Threads that are started inside, and what this one does, do not preempt a training step when they wake up.

    Linux has a policy for it, which keeps their usual share of a core (SCHED_BATCH, sched(7)).
    """
    changed = False
    with suppress(AttributeError, OSError):  # another system has none; a container may forbid it
        if os.sched_getscheduler(0) == os.SCHED_OTHER:
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
            changed = True
    try:
        yield
    finally:
        if changed:
            os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))


def append_whole(path: Path, line: str) -> None:
    """Append a line, or nothing where storage does not take it: what is only told must not end what is done."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab", buffering=0) as handle:
            before, data = handle.tell(), line.encode()
            if handle.write(data) != len(data):
                handle.truncate(before)
    except OSError as error:
        logger.warning("%s: a line is lost: %s", path, error)


def is_alive(pid: int, created: float) -> bool:
    """Whether the process still runs that was started with this pid at `created`; a reused pid is another process."""
    try:
        process = psutil.Process(pid)
        return process.status() != psutil.STATUS_ZOMBIE and abs(process.create_time() - created) < 1.0
    except psutil.NoSuchProcess:
        return False


def end_tree(root: psutil.Process) -> None:
    """End a process and all its descendants: SIGTERM, a grace, then SIGKILL. Ranks have sessions of their own.

    `root` carries its start time, so that a pid which was given away since is left alone.
    """
    try:
        tree = [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    # The root ends its own children, as the launcher does its ranks; whatever is left then is a stray.
    _signal([root], "terminate")
    psutil.wait_procs([root], timeout=_TERMINATE_GRACE_S)
    _signal(tree, "terminate")
    _, alive = psutil.wait_procs(tree, timeout=_STRAY_GRACE_S)
    _signal(alive, "kill")
    psutil.wait_procs(alive, timeout=_STRAY_GRACE_S)


def _signal(processes: Sequence[psutil.Process], action: str) -> None:
    for process in processes:
        try:
            getattr(process, action)()
        except psutil.NoSuchProcess:
            continue


def error_of(code: int, lines: Sequence[str], program: str) -> CherryError:
    """The error that an exit code and the last lines of output stand for."""
    text = _message(lines) or f"{program} ended with exit code {code}; its last lines:\n" + "\n".join(lines[-10:])
    if code < 0:
        return WorkerLostError(f"{program} was killed by signal {-code}")
    for kind in vars(base.errors).values():
        if isinstance(kind, type) and issubclass(kind, CherryError) and kind.exit_code == code and code != 1:
            return kind(text)
    side = OperationalError if is_retryable_exit_code(code) else CherryError
    error = InvalidInputError(text) if code in CALLER_EXIT_CODES else side(text)
    error.exit_code = code
    return error


def _message(lines: Sequence[str]) -> str:
    """The text after the last `error:` that is not the launcher's, with the indented lines that belong to it."""
    for start in range(len(lines) - 1, -1, -1):
        if lines[start].startswith("error: ") and "its own message is above" not in lines[start]:
            rest = []
            for line in lines[start + 1 :]:
                if not line.startswith("  "):
                    break
                rest.append(line)
            return "\n".join([lines[start].removeprefix("error: "), *rest])
    return ""
