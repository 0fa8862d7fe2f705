"""Subprocesses of tasks: their output, progress and errors, and the end of all their descendants."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Annotated

import psutil
from pydantic import Field

from base import storage
from base.errors import ERROR_FILE_VARIABLE, CherryError, WorkerLostError, error_of_code, read_error
from base.json_lines import JsonLinesReader
from base.progress import PROGRESS_FILE_VARIABLE
from base.scratch import scratch_folder
from tasks.processes.programs import module_command, module_environment

# Prefect's worker gives a cancelled flow 30 s before SIGKILL; the launcher needs 10 s of them to end its ranks.
_TERMINATE_GRACE_S = 15.0
_STRAY_GRACE_S = 3.0
_SHOWN_LINES = 10


def run_module(
    module: str,
    arguments: Sequence[str],
    *,
    on_line: Callable[[str], None],
    on_progress: Callable[[str, float], None] | None = None,
    record_file: Path | None = None,
) -> None:
    """Run `python -m module arguments` to its end; see `run_command`."""
    command = module_command(module, arguments)
    run_command(command, name=module, on_line=on_line, on_progress=on_progress, record_file=record_file)


def run_command(
    command: Sequence[str],
    *,
    name: str,
    on_line: Callable[[str], None],
    on_progress: Callable[[str, float], None] | None = None,
    record_file: Path | None = None,
    until: float | None = None,
    beside: Callable[[int, Path], AbstractContextManager[None]] | None = None,
) -> None:
    """Run a command to its end.

    Args:
        name: what an error without a text of its own calls it.
        on_line: gets each line of its output.
        on_progress: gets the lines that report progress in place of `on_line`, with the fraction that is done.
        record_file: holds the program's pid while it runs, for a clean-up by another process.
        until: Unix time at which it gets SIGTERM; `None` lets it run.
        beside: makes a context that is entered while the program runs, from its pid and the file of its progress.

    Raises:
        CherryError: the program's own error; see `error_of`.
    """
    with scratch_folder("cherry-program") as folder:
        error_file, progress_file = folder / "error.json", folder / "progress.jsonl"
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=_environment(error_file, progress_file),
            start_new_session=True,
        )
        lines: deque[str] = deque(maxlen=_SHOWN_LINES)
        watched = nullcontext() if beside is None else beside(process.pid, progress_file)
        with _recorded(process, record_file), _terminated_at(process, until), watched:
            for line, fraction in _output(process, progress_file):
                lines.append(line)
                if fraction is None or on_progress is None:
                    on_line(line)
                else:
                    on_progress(line, fraction)
            code = process.wait()
        if code:
            raise error_of(code, list(lines), name, error_file=error_file)


def _environment(error_file: Path, progress_file: Path) -> dict[str, str]:
    return {
        **module_environment(),
        "PYTHONUNBUFFERED": "1",
        "CHERRY_PARENT": str(os.getpid()),
        ERROR_FILE_VARIABLE: str(error_file),
        PROGRESS_FILE_VARIABLE: str(progress_file),
    }


def _output(process: subprocess.Popen[str], progress_file: Path) -> Iterator[tuple[str, float | None]]:
    """Lines of a program's output, each with the fraction that it reports if it reports one."""
    reader = JsonLinesReader(progress_file)
    fractions: dict[str, float] = {}
    assert process.stdout is not None
    for line in process.stdout:
        line = line.rstrip("\n")
        # A report is written before its line is printed.
        fractions |= {report["line"]: report["fraction"] for report in reader.read_new() or [] if "line" in report}
        yield line, fractions.pop(line, None)


@contextmanager
def _recorded(process: subprocess.Popen[str], record_file: Path | None) -> Iterator[None]:
    """Keep the process in `record_file`, and end it with all its descendants on the way out."""
    root = psutil.Process(process.pid)
    try:
        if record_file is not None:
            storage.write_json(str(record_file), {"pid": root.pid, "created": root.create_time()})
        yield
    finally:
        # Also reached by Prefect's TerminationSignal, which is a BaseException.
        end_tree(root)
        process.wait()
        if process.stdout is not None:
            process.stdout.close()
        if record_file is not None:
            record_file.unlink(missing_ok=True)


@contextmanager
def _terminated_at(process: subprocess.Popen[str], until: float | None) -> Iterator[None]:
    """Send the process SIGTERM at a Unix time, if it runs until then."""
    if until is None:
        yield
        return
    timer = threading.Timer(max(0.0, until - time.time()), process.terminate)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@contextmanager
def in_background() -> Iterator[None]:
    """Context for work beside training: this thread, and those started inside, do not preempt a training step.

    Linux has a scheduling policy for it, which keeps their usual share of a core (SCHED_BATCH, sched(7)).
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


Pid = Annotated[int, Field(gt=0, lt=2**31)]
"""Process id in a record on disk, which may have been damaged."""


def is_alive(pid: int, created: float) -> bool:
    """Whether the process still runs that was started with this pid at `created`; a reused pid is another process."""
    try:
        process = psutil.Process(pid)
        return process.status() != psutil.STATUS_ZOMBIE and abs(process.create_time() - created) < 1.0
    except psutil.NoSuchProcess:
        return False


def end_tree(root: psutil.Process) -> None:
    """End a process and all its descendants: SIGTERM, a grace period, then SIGKILL. Ranks have their own sessions.

    `root` carries its start time, so that a process that reuses its pid is not signalled.
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


def error_of(code: int, lines: Sequence[str], program: str, *, error_file: Path | None = None) -> CherryError:
    """The error of a program that ended: what it wrote to its error file, else its exit code and last lines of output.

    Args:
        code: negative for a signal.
    """
    written = None if error_file is None else read_error(error_file)
    if written is not None and written.exit_code == code:
        return written
    how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
    text = f"{program} {how}; its last lines:\n" + "\n".join(lines[-_SHOWN_LINES:])
    return WorkerLostError(text) if code < 0 else error_of_code(code, text)
