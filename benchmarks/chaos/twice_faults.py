"""The same job started a second time while it trains, on its own host or on another one that shares its directory."""

from __future__ import annotations

import random
import time

from base.errors import SupersededError
from benchmarks.chaos.local import LocalCampaign
from benchmarks.chaos.record import Fault
from tests.hosts import LabHosts
from tests.processes import kill_all
from tests.supervised import until
from tests.training_job import Job

FLAGS = ("--set", "checkpoint.every_steps=20")
KINDS = ("started twice on one host", "started twice on two hosts")


class TwiceCampaign(LocalCampaign):
    """A job of two ranks in the first of two hosts, which is started again in the same one or in the other."""

    def __init__(self, job: Job, hosts: LabHosts, choose: random.Random) -> None:
        super().__init__(job, choose, *FLAGS)
        self._hosts, self._host = hosts, hosts.names[0]
        self._start(*hosts.inside(self._host))

    def close(self) -> None:
        """End the job with all of its processes: a signal to what entered a host would not reach them."""
        for name in self._hosts.names:
            kill_all(self._hosts.processes(name))
        super().close()

    def _meet(self, kind: str) -> Fault:
        """One of both goes on: the newer, which took over; the older ends before it writes anything more."""
        until(lambda: len(self._job.metrics) > 20, "training")
        time.sleep(self._choose.uniform(0.2, 4.0))
        if kind.endswith("two hosts"):
            self._host = next(name for name in self._hosts.names if name != self._host)
        fault, older, began = Fault(kind, "local"), self._process, time.time()
        assert older is not None
        newer = self._start(*self._hosts.inside(self._host))
        until(lambda: older.poll() is not None, "the end of the older one")
        fault.detect_s = time.time() - began
        at = len(self._job.metrics)
        until(lambda: len(self._job.metrics) > at + 20 or newer.poll() is not None, "steps of the newer one")
        fault.recover_s = time.time() - began
        fault.data_lost = older.returncode != SupersededError.exit_code or newer.poll() is not None
        return fault
