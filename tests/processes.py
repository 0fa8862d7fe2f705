"""Processes seen from outside. Any of them may end between two looks, which is no error of the one who looks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import suppress

import psutil


def command_line(process: psutil.Process) -> list[str]:
    """The words that a process was started with; empty once it has ended."""
    try:
        return process.cmdline()
    except psutil.NoSuchProcess:  # also of one that waits to be reaped
        return []


def every(*attributes: str) -> Iterator[psutil.Process]:
    """All processes with these attributes in `info`, like `psutil.process_iter`, whose processes all threads share:
    one that asks for other attributes would replace them."""
    for pid in psutil.pids():
        try:
            process = psutil.Process(pid)
            process.info = process.as_dict(attributes)
        except psutil.NoSuchProcess:
            continue
        yield process


def is_alive(process: psutil.Process) -> bool:
    """Whether a process runs; one that only waits to be reaped does not."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def tree(pid: int) -> list[psutil.Process]:
    """A process with all of its descendants; empty once it has ended."""
    try:
        root = psutil.Process(pid)
        return [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def kill_all(processes: Iterable[psutil.Process]) -> None:
    """SIGKILL to each of the processes that still runs."""
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()
