"""A job on several hosts that meets one fault after the other, and goes on after each of them."""

from __future__ import annotations

import random
import re
import time
from abc import ABC, abstractmethod
from collections.abc import Callable

import psutil

from benchmarks.chaos.record import Fault
from cherry.checkpoint.naming import newest_checkpoint
from tests.processes import command_line, is_alive
from tests.supervised import Supervised, until

_SAVE_EVERY = 20
_BATCH = 12  # divisible by two and by three ranks
_LATEST_S = 4.0
PROGRAMS = {"rank": ("-u", "train.py"), "launcher": ("cherry.launcher",), "agent": ("cherry.remote.agent",)}
_OURS = {"train.py", "cherry.launcher", "cherry.remote.agent", "cherry.slurm.attempt"}
ENDLESS = "--steps=1000000"
FLAGS = (f"--batch_size={_BATCH}", "--set", f"checkpoint.every_steps={_SAVE_EVERY}")


class Campaign(ABC):
    """One job and the faults that it meets."""

    provider: str

    def __init__(
        self, supervised: Supervised, nodes: int, choose: random.Random, flags: tuple[str, ...] = FLAGS
    ) -> None:
        self._supervised, self._nodes, self._choose, self._flags = supervised, nodes, choose, flags
        self._job, self._hosts = supervised.job, supervised.hosts
        self._process: psutil.Process
        self._later: list[Callable[[], None]] = []
        """What mends the last fault, once the job has gone on without that."""
        self.faults: list[Fault] = []

    @abstractmethod
    def start(self, steps: str = ENDLESS) -> None:
        """Start the job, from its newest checkpoint if it has one."""

    @abstractmethod
    def _inject(self, kind: str, first: str, host: str, others: list[str]) -> None:
        """Inject a fault.

        Args:
            first: the host of rank 0.
            host: any host of the job.
            others: the hosts but that of rank 0.
        """

    def run(self, kinds: list[str]) -> list[float]:
        """Meet faults of these kinds, then go on to a good end; the job's losses."""
        self.start()
        self.meet_all(kinds)
        steps = len(self._job.losses) + _SAVE_EVERY
        self.end()
        self.start(f"--steps={max(steps, len(self._job.losses) + 1)}")
        code = self._supervised.code()
        time.sleep(_LATEST_S)  # agents end after the job
        left, numbers = self._supervised.left(), [line["step"] for line in self._job.metrics]
        for one in self.faults:
            one.completed = code == 0
            one.survivors += len(left)
            one.data_lost |= numbers != list(range(1, len(numbers) + 1))
        return self._job.losses

    def meet_all(self, kinds: list[str]) -> None:
        """Meet faults of these kinds, each a moment after the job has gone on."""
        for kind in kinds:
            self.wait_until_training()
            time.sleep(self._choose.uniform(0.2, _LATEST_S))
            self.meet(kind)

    def wait_until_training(self) -> None:
        """Wait until the job runs and has a checkpoint."""
        until(self._is_training, "training")

    def end(self) -> None:
        """End the job by SIGTERM, on all its hosts."""
        self._process.terminate()
        self._supervised.code()

    def close(self) -> None:
        """End the job, if it still runs."""
        self._supervised.end()

    def meet(self, kind: str) -> None:
        """Inject a fault into the job, which trains and has a checkpoint, and see it go on."""
        old = [one for name in self._hosts.names for one in self._hosts.processes(name) if _is_ours(one)]
        before, committed, lines = len(self._supervised.attempts), self._committed(), len(self._job.metrics)
        fault, injected = Fault(kind, self.provider), time.time()
        first, *others = self._began_hosts()
        self._inject(kind, first, self._choose.choice([first, *others]), others)
        until(lambda: self._began(before) is not None, f"the attempt after {kind}: {self._supervised.output[-2000:]}")
        at = len(self._supervised.output)  # the last lines of the attempt before, which are told at its end, are past
        fault.survivors = sum(map(is_alive, old))
        until(lambda: self._trains_since(at), f"a step after {kind}: {self._supervised.output[-2000:]}")
        fault.recover_s = time.time() - injected
        fault.detect_s = self._noticed(before, injected)
        resumed = int(re.findall(r"resumed from \S*step_(\d+)", self._supervised.output[at:])[-1])
        fault.data_lost = resumed < committed
        fault.steps_repeated = max(0, lines - resumed)
        self.faults.append(fault)
        print(f"  {len(self.faults):3d} {fault}", flush=True)
        for undo in self._later:
            undo()
        self._later.clear()

    def _is_training(self) -> bool:
        events = self._supervised.events
        return bool(events) and events[-1][0] == "began" and self._committed() > 0

    def _began(self, before: int) -> dict[str, object] | None:
        return next((line for line in self._supervised.attempts[before:] if line["event"] == "began"), None)

    def _trains_since(self, place: int) -> bool:
        _, resumed, after = self._supervised.output[place:].partition("resumed from")
        return bool(resumed) and "\nstep " in after

    def _noticed(self, before: int, injected: float) -> float | None:
        """Seconds until the supervisor knew, 0 while the fault was being made; `None` where it was killed itself."""
        began = [line for line in self._supervised.attempts[:before] if line["event"] == "began"][-1]
        ended = next((line for line in self._supervised.attempts[before:] if line["event"] == "ended"), None)
        if ended is None or "after_s" not in ended:
            return None
        return max(0.0, began["time"] + ended["after_s"] - injected)

    def _committed(self) -> int:
        newest = newest_checkpoint(str(self._job.directory / "train" / "checkpoints"))
        return 0 if newest is None else int(newest.rpartition("_")[2])

    def _began_hosts(self) -> list[str]:
        began = [line for line in self._supervised.attempts if line["event"] == "began"][-1]
        return list(began["hosts"])

    def _program(self, host: str, name: str) -> psutil.Process:
        words = set(PROGRAMS[name])

        def found() -> list[psutil.Process]:
            return [one for one in self._hosts.processes(host) if words <= set(command_line(one))]

        return self._choose.choice(until(found, f"a {name} on {host}; {self._supervised.output[-3000:]}"))


def _is_ours(process: psutil.Process) -> bool:
    """Whether a process on a host belongs to a job."""
    return not _OURS.isdisjoint(command_line(process))
