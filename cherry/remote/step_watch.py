"""Watch over a job's steps: how long none may come before the job counts as hanging."""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable

# Of the median step.
_TIMES = 3.0
_MEDIAN_OF = 51
# An evaluation, a checkpoint or the second step has none to go by. As long as NCCL waits for a collective by default.
_BUSY_S = 600.0


class StepWatch:
    """The times between a job's lines of progress. Before the first line nothing is known, so nothing is overdue.

    Args:
        least_s: silence that is never too long.
        clock: monotonic time in seconds.
    """

    def __init__(self, least_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._least_s, self._clock = least_s, clock
        self._intervals: deque[float] = deque(maxlen=_MEDIAN_OF)
        self._last: float | None = None
        self._busy = False

    def begin(self) -> None:
        """Take note that the job starts again, with steps as long as before."""
        self._last, self._busy = None, False

    @property
    def has_steps(self) -> bool:
        """Whether a line of progress has come since the job started."""
        return self._last is not None

    def progressed(self) -> None:
        """Take note of a line of progress."""
        now = self._clock()
        if self._last is not None:
            self._intervals.append(now - self._last)
        self._last = now

    def busy(self, what: str | None) -> None:
        """Take note that something begins that takes longer than a step, or, by `None`, that it has ended."""
        self._busy = what is not None
        if self._last is not None:
            self._last = self._clock()

    @property
    def silent_s(self) -> float:
        """Seconds since the last line of progress, or the end of what took longer."""
        return 0.0 if self._last is None else self._clock() - self._last

    @property
    def limit_s(self) -> float | None:
        """Seconds of silence after which the job hangs; `None` while that is not known."""
        if self._last is None:
            return None
        if not self._intervals:
            return max(self._least_s, _BUSY_S)
        limit = max(self._least_s, _TIMES * statistics.median(self._intervals))
        return max(limit, _BUSY_S) if self._busy else limit

    def hangs(self) -> bool:
        """Whether the silence has lasted too long."""
        limit = self.limit_s
        return limit is not None and self.silent_s > limit
