"""A job of two ranks on this machine that meets one fault after the other."""

from __future__ import annotations

import random
import subprocess
from abc import ABC, abstractmethod

from benchmarks.chaos.campaign import ENDLESS
from benchmarks.chaos.record import Fault
from tests.training_job import ROOT, Job, environment_of_programs

RANKS = 2
CONSTANT = ("--set", "train.schedule=constant")  # so that the number of steps changes no step


class LocalCampaign(ABC):
    """One job and the faults that it meets. `flags` are its own beside `CONSTANT`."""

    def __init__(self, job: Job, choose: random.Random, *flags: str) -> None:
        self._job, self._choose, self._flags = job, choose, (*flags, *CONSTANT)
        self._log = job.directory.parent / f"{job.directory.name}.log"
        self._process: subprocess.Popen[bytes] | None = None
        self.faults: list[Fault] = []

    @abstractmethod
    def _meet(self, kind: str) -> Fault:
        """Inject a fault, and wait until the job goes on."""

    def run(self, kinds: list[str]) -> list[float]:
        """Meet faults of these kinds, then go on to a good end; the job's losses."""
        for kind in kinds:
            self.faults.append(self._meet(kind))
            print(f"  {len(self.faults):3d} {self.faults[-1]}", flush=True)
        self.close()
        steps = len(self._job.losses) + 20
        ended = self._job.run(f"--steps={steps}", *self._flags, ranks=RANKS)
        numbers = [line["step"] for line in self._job.metrics]
        for one in self.faults:
            one.completed = ended.returncode == 0
            one.data_lost |= numbers != list(range(1, steps + 1))
        if ended.returncode:
            print(ended.stdout[-2000:], ended.stderr[-2000:])
        return self._job.losses

    def close(self) -> None:
        """End the job, if it still runs."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def _start(self, *inside: str) -> subprocess.Popen[bytes]:
        """Start it, from its newest checkpoint if it has one. `inside` is a command that takes this one."""
        command = [*inside, *self._job.command(ENDLESS, *self._flags, ranks=RANKS)]
        with self._log.open("ab") as output:
            self._process = subprocess.Popen(
                command, cwd=ROOT, env=environment_of_programs(), stdout=output, stderr=output, start_new_session=True
            )
        return self._process
