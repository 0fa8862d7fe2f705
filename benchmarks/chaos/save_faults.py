"""A job that saves at every step and is killed outright, again and again; also on an object store that fails."""

from __future__ import annotations

import random
import signal
import subprocess
import time
from pathlib import Path

import psutil

from benchmarks.chaos.record import Fault
from cherry.checkpoint.naming import newest_checkpoint
from tests.supervised import until
from tests.training_job import ROOT, Job, environment_of_programs

RANKS = 2
CONSTANT = ("--set", "train.schedule=constant")  # so that the number of steps changes no step
_LATEST_S = 1.0


def finish(job: Job, faults: list[Fault], steps: int, *flags: str) -> list[float]:
    """Let a job go on to so many steps, and note with its faults what came of it; its losses."""
    ended = job.run(f"--steps={steps}", *flags, *CONSTANT, ranks=RANKS)
    numbers = [line["step"] for line in job.metrics]
    for one in faults:
        one.completed = ended.returncode == 0
        one.data_lost |= numbers != list(range(1, steps + 1))
    if ended.returncode:
        print(ended.stdout[-2000:], ended.stderr[-2000:])
    return job.losses


class SaveCampaign:
    """One job of two ranks on this machine, killed `count` times."""

    def __init__(self, job: Job, choose: random.Random) -> None:
        self._job, self._choose = job, choose
        self.flags = ("--set", "checkpoint.every_steps=1")
        self.faults: list[Fault] = []
        self.in_a_save = 0
        """Kills that left a checkpoint that was being written."""

    def run(self, count: int) -> list[float]:
        """Kill it so often, then let it end; the job's losses."""
        for _ in range(count):
            self.faults.append(self._kill())
            print(f"  {len(self.faults):3d} {self.faults[-1]}", flush=True)
        return finish(self._job, self.faults, max(len(self._job.losses), self._newest()) + 4, *self.flags)

    def _kill(self) -> Fault:
        committed = self._newest()
        log = self._job.directory.parent / f"{self._job.directory.name}.log"
        with log.open("wb") as output:
            command = self._job.command("--steps=1000000", *self.flags, *CONSTANT, ranks=RANKS)
            began = time.time()
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment_of_programs(), stdout=output, stderr=output, start_new_session=True
            )
        until(lambda: "\nstep " in log.read_text() or process.poll() is not None, "the first step")
        fault = Fault("kill during a save", "local", recover_s=time.time() - began)
        said = log.read_text()
        assert process.poll() is None, said
        resumed = int(said.partition("resumed from")[2].partition("step_")[2].split(":")[0]) if committed else 0
        fault.data_lost = resumed < committed
        time.sleep(self._choose.uniform(0.0, _LATEST_S))
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        for one in family:
            one.send_signal(signal.SIGKILL)
        process.wait()
        _, alive = psutil.wait_procs(family[1:], timeout=10)
        fault.survivors = len(alive)
        fault.steps_repeated = len(self._job.losses) - self._newest()
        self.in_a_save += any(not (one / "COMMITTED").exists() for one in self._checkpoints().glob("step_*"))
        return fault

    def _checkpoints(self) -> Path:
        return self._job.directory / "train" / "checkpoints"

    def _newest(self) -> int:
        newest = newest_checkpoint(str(self._checkpoints()))
        return 0 if newest is None else int(newest.rpartition("_")[2])
