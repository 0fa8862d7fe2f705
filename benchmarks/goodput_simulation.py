"""Event simulation of a training job's goodput: steps, saves, failures, detection and restarts, from a seed.

It shares no code with the closed form in cherry/planner/goodput.py, which is compared with it.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from cherry.planner.goodput import Reliability


@dataclass(frozen=True)
class Outcome:
    """Outcome of a simulated run."""

    wall_s: float
    failures: int
    saves: int
    goodput: float
    """Training time without failures or saves, over wall-clock time."""


def simulate(reliability: Reliability, step_s: float, interval_steps: int, steps: int, seed: int) -> Outcome:
    """Outcome of `steps` optimizer steps through failures, with a save after every `interval_steps`.

    A save stalls training, then is written while steps go on; a save that comes due while one is being written waits
    for it, as cherry/checkpoint/checkpointer.py does. A failure, also one during a save or a restart, throws the job
    back to the last save that was written.
    """
    job = _Job(reliability, step_s, interval_steps, random.Random(seed))
    while job.done < steps:
        job.step()
    return Outcome(job.now, job.failures, job.saves, steps * step_s / job.now)


class _Job:
    def __init__(self, reliability: Reliability, step_s: float, interval_steps: int, draws: random.Random) -> None:
        self.now, self.done, self.failures, self.saves = 0.0, 0, 0, 0
        self._reliability, self._step_s, self._interval = reliability, step_s, interval_steps
        self._draws = draws
        self._kept = 0
        self._writing: tuple[float, int] | None = None
        """Time at which the save in flight is complete, and its step."""
        self._next_failure = self._draw()

    def step(self) -> None:
        """Simulate one step and the save that is due after it, or the failure before its end."""
        if not self._pass(self._step_s):
            return
        self.done += 1
        if self.done % self._interval:
            return
        if self._writing is not None and not self._pass(max(0.0, self._writing[0] - self.now)):
            return
        self._settle()
        if self._pass(self._reliability.stall_s):
            self._writing = (self.now + self._reliability.write_s, self.done)

    def _pass(self, seconds: float) -> bool:
        """True after `seconds` without a failure; False after a failure and the rollback to the last complete save."""
        if self.now + seconds < self._next_failure:
            self.now += seconds
            self._settle()
            return True
        self.now = self._next_failure
        self._settle()
        self._fail()
        return False

    def _settle(self) -> None:
        """Commit a save that has been written."""
        if self._writing is not None and self._writing[0] <= self.now:
            self._kept, self._writing = self._writing[1], None
            self.saves += 1

    def _fail(self) -> None:
        """Restart until a restart completes without a failure."""
        self._writing, self.done = None, self._kept
        while True:
            self.failures += 1
            self._next_failure = self._draw()
            ready = self.now + self._reliability.restart_s
            if ready < self._next_failure:
                self.now = ready
                return
            self.now = self._next_failure

    def _draw(self) -> float:
        rate = self._reliability.failures_per_s
        return self.now + self._draws.expovariate(rate) if rate > 0 else float("inf")
