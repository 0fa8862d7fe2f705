"""Budget of an engine's restarts: so many in a window of time, after which it counts as broken for good."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

MAX_RESTARTS = 3
"""Restarts in one window. A device that is lost fails at once each time, so that more would only delay the end."""
WINDOW_S = 60.0
"""Seconds; an engine that ran longer between failures is worth starting again."""


class RestartBudget:
    """Restarts that are left in the newest window."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.taken = 0
        self._clock = clock
        self._newest: deque[float] = deque()

    def take(self) -> bool:
        """Whether one more restart is allowed now; it is then counted."""
        now = self._clock()
        while self._newest and self._newest[0] <= now - WINDOW_S:
            self._newest.popleft()
        if len(self._newest) >= MAX_RESTARTS:
            return False
        self._newest.append(now)
        self.taken += 1
        return True
