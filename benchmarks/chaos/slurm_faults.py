"""Faults of a job on two nodes under a real Slurm, which queues it again after each of them."""

from __future__ import annotations

import random

import psutil

from benchmarks.chaos.campaign import ENDLESS, Campaign
from tests.queued import Queued
from tests.slurm import SlurmLab
from tests.training_job import Job, environment_of_programs

KINDS = (
    *("rank killed", "launcher killed", "slurmd killed", "node set down", "time limit's warning", "scontrol requeue"),
    *("power loss", "power loss of rank 0's host"),
)


class SlurmCampaign(Campaign):
    """A job of `cherry.slurm.submit`, on a cluster that has a node more than it needs."""

    provider = "slurm"

    def __init__(self, job: Job, lab: SlurmLab, nodes: int, choose: random.Random) -> None:
        self._queued, self._lab = Queued(job, lab, environment_of_programs()), lab
        super().__init__(self._queued, nodes, choose)

    def start(self, steps: str = ENDLESS) -> None:
        process = self._queued.start(*self._flags, steps, nodes=self._nodes, requeues=1000)
        self._process = psutil.Process(process.pid)

    def _inject(self, kind: str, first: str, host: str, others: list[str]) -> None:
        job = self._queued.slurm_job["JobId"]
        if kind in ("rank killed", "launcher killed"):
            self._program(host, kind.partition(" ")[0]).kill()
        elif kind == "slurmd killed":
            self._lab.kill_slurmd(host)
            self._later.append(lambda: self._lab.start_slurmd(host))
        elif kind == "node set down":
            self._lab.call("scontrol", "update", f"nodename={host}", "state=down", "reason=chaos")
            # One that returns to service by itself is not resumed.
            resume = ("scontrol", "update", f"nodename={host}", "state=resume")
            self._later.append(lambda: self._lab.call(*resume, check=False))
        elif kind == "time limit's warning":
            self._lab.call("scancel", "--batch", "--signal=USR1", job)
        elif kind == "scontrol requeue":
            self._lab.call("scontrol", "requeue", job)
        elif kind.startswith("power loss"):
            lost = first if "rank 0" in kind else self._choose.choice(others)
            self._hosts.power_loss(lost)
            self._later.append(lambda: self._boot(lost))
        else:
            raise ValueError(kind)

    def _boot(self, host: str) -> None:
        self._hosts.start(host)
        self._lab.start_slurmd(host)
