"""Ends what a process started, once it is gone: also tests that were killed outright leave nothing.

Run as `python tests/watcher.py PID MARK`: it waits for the process PID and kills every process whose environment holds
CHERRY_TEST_SESSION=MARK.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import uuid

import psutil

VARIABLE = "CHERRY_TEST_SESSION"


def watch_this_process() -> None:
    """Let a process of its own end what this one starts from now on, should this one be killed."""
    mark = uuid.uuid4().hex
    without = {key: value for key, value in os.environ.items() if key != VARIABLE}
    command = [sys.executable, __file__, str(os.getpid()), mark]
    process = subprocess.Popen(command, env=without, stdin=subprocess.DEVNULL, start_new_session=True)
    process.returncode = 0  # it outlives this process on purpose: Popen shall not warn of it
    os.environ[VARIABLE] = mark


def marked(mark: str) -> list[psutil.Process]:
    """Processes that belong to the session."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.environ().get(VARIABLE) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def main(pid: int, mark: str) -> None:
    """Wait, then kill until nothing is left: a process may start another one meanwhile."""
    with contextlib.suppress(psutil.NoSuchProcess):
        psutil.Process(pid).wait()
    while left := marked(mark):
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(left, timeout=5)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
