"""Watch over training on this machine: when its steps stop, the stacks of all ranks are kept. It ends nothing.

On given hosts the supervisor watches, and starts the job again (cherry/remote/attempt.py).
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from base.json_lines import JsonLinesReader
from cherry.remote.step_watch import StepWatch
from cherry.watch.stacks import keep_stacks, log_sizes

_POLL_S = 1.0
# Ranks write their stacks at once, but may have to be woken for it.
_STACKS_S = 2.0


class HangWatch:
    """Finds a hang by the progress that a launcher's ranks report.

    Args:
        folder: `train/` of the run directory.
        ranks: ranks of the job.
        least_s: seconds without a step that are never too long; three times the median step must have passed too.
        say: reports a line.
    """

    def __init__(self, folder: Path, ranks: int, least_s: float, say: Callable[[str], None]) -> None:
        self._folder, self._ranks, self._say = folder, ranks, say
        self._watch = StepWatch(least_s)
        self._stop = threading.Event()

    @contextmanager
    def over(self, pid: int, progress_file: Path) -> Iterator[None]:
        """Context in which the launcher of this pid is watched; it passes SIGUSR1 on to its ranks."""
        thread = threading.Thread(target=self._follow, args=(pid, progress_file), name="hang-watch", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._stop.set()
            thread.join()

    def _follow(self, pid: int, progress_file: Path) -> None:
        reader, told = JsonLinesReader(progress_file), False
        while not self._stop.wait(_POLL_S):
            for report in reader.read_new() or []:
                if "line" in report:
                    self._watch.progressed()
                    told = False
                else:
                    self._watch.busy(report.get("busy"))
            if not told and self._watch.hangs():
                told = True
                with suppress(OSError):  # it has just ended, or the disk is full
                    self._keep(pid)

    def _keep(self, pid: int) -> None:
        text = f"no step for {self._watch.silent_s:.0f} s, the limit is {self._watch.limit_s:.0f} s"
        before = log_sizes(self._folder)
        os.kill(pid, signal.SIGUSR1)
        self._stop.wait(_STACKS_S)
        kept = keep_stacks(self._folder, before, self._ranks, text)
        self._say(f"training may hang: {text}. The ranks' stacks are in {kept}; what to do is in docs/runbook.md")
