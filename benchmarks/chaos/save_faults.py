"""A job that saves at every step and is killed outright, again and again."""

from __future__ import annotations

import random
import time
from pathlib import Path

import psutil

from benchmarks.chaos.local import LocalCampaign
from benchmarks.chaos.record import Fault
from cherry.checkpoint.naming import newest_checkpoint
from tests.processes import kill_all, tree
from tests.supervised import until
from tests.training_job import Job

FLAGS = ("--set", "checkpoint.every_steps=1")
KINDS = ("kill during a save",)
_LATEST_S = 1.0


class SaveCampaign(LocalCampaign):
    """One job whose launcher and ranks are killed at any moment of its saves."""

    def __init__(self, job: Job, choose: random.Random) -> None:
        super().__init__(job, choose, *FLAGS)
        self.in_a_save = 0
        """Kills that left a checkpoint that was being written."""

    def _meet(self, kind: str) -> Fault:
        committed, began, at = self._newest(), time.time(), self._said("")
        process = self._start()
        until(lambda: "\nstep " in self._said(at) or process.poll() is not None, "the first step")
        fault, said = Fault(kind, "local", recover_s=time.time() - began), self._said(at)
        assert process.poll() is None, said
        resumed = int(said.partition("resumed from")[2].partition("step_")[2].split(":")[0]) if committed else 0
        fault.data_lost = resumed < committed
        time.sleep(self._choose.uniform(0.0, _LATEST_S))
        family = tree(process.pid)
        kill_all(family)
        process.wait()
        _, alive = psutil.wait_procs(family[1:], timeout=10)
        fault.survivors = len(alive)
        fault.steps_repeated = len(self._job.losses) - self._newest()
        self.in_a_save += any(not (one / "COMMITTED").exists() for one in self._checkpoints().glob("step_*"))
        return fault

    def _said(self, before: str) -> str:
        """What the job has printed after that."""
        return self._log.read_text()[len(before) :] if self._log.exists() else ""

    def _checkpoints(self) -> Path:
        return self._job.directory / "train" / "checkpoints"

    def _newest(self) -> int:
        newest = newest_checkpoint(str(self._checkpoints()))
        return 0 if newest is None else int(newest.rpartition("_")[2])
