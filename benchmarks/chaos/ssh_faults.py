"""Faults of a job on two or three hosts over ssh, whose supervisor goes on after each of them."""

from __future__ import annotations

import os
import random
import signal
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from base.errors import MissingFileError
from benchmarks.chaos.campaign import ENDLESS, FLAGS, PROGRAMS, Campaign
from tests.hosts import LabHosts, missing
from tests.supervised import Supervised
from tests.training_job import Job, environment_of_programs

_CUT_S = 10.0, 20.0  # longer than it takes to notice; some end within the lease, some after it


@contextmanager
def hosts_of(count: int) -> Iterator[LabHosts]:
    """So many hosts on this machine.

    Raises:
        MissingFileError: a program that makes them is not installed, or namespaces are not allowed.
    """
    if (reason := missing()) is not None:
        raise MissingFileError(reason)
    with tempfile.TemporaryDirectory(prefix="cherry-hosts-") as name:
        hosts = LabHosts(Path(name) / "lab", count)
        try:
            hosts.up()
            yield hosts
        finally:
            hosts.down()


class SshCampaign(Campaign):
    """A job under the supervisor."""

    provider = "ssh"

    def __init__(
        self, job: Job, hosts: LabHosts, nodes: int, choose: random.Random, flags: tuple[str, ...] = FLAGS
    ) -> None:
        super().__init__(Supervised(job, hosts, environment_of_programs()), nodes, choose, flags)

    def start(self, steps: str = ENDLESS) -> None:
        spares = [{"host": name} for name in self._hosts.names[self._nodes :]]
        recovery = {"attempts": 1000, "backoff_s": 0.0, "hang_s": 10.0, "spares": spares}
        process = self._supervised.start(*self._flags, steps, nodes=self._nodes, recovery=recovery)
        self._process = psutil.Process(process.pid)

    def _inject(self, kind: str, first: str, host: str, others: list[str]) -> None:
        if (name := kind.partition(" killed")[0]) in PROGRAMS:
            self._program(host, name).kill()
        elif kind == "rank stopped":
            self._program(host, "rank").send_signal(signal.SIGSTOP)
        elif kind == "supervisor killed":
            self._process.kill()
            self._process.wait()
            self.start()
        elif kind == "connections closed":
            self._close_connections()
        elif kind.startswith("power loss"):
            host = first if "rank 0" in kind else self._choose.choice(others)
            self._hosts.power_loss(host)
            self._later.append(lambda: self._hosts.start(host))
        elif kind.startswith("cut"):
            self._hosts.cut(host)
            if "heals" in kind:
                time.sleep(self._choose.uniform(*_CUT_S))
                self._hosts.join(host)
            else:
                self._later.append(lambda: self._hosts.join(host))
        else:
            raise ValueError(kind)

    def _close_connections(self) -> None:
        """End the ssh servers' processes of all open connections, at once."""
        for name in self._hosts.names:
            for one in self._hosts.sessions(name):
                os.kill(one.pid, signal.SIGKILL)


KINDS = (
    *("rank killed", "launcher killed", "agent killed", "supervisor killed", "connections closed", "rank stopped"),
    *("power loss", "power loss of rank 0's host", "cut that stays", "cut that heals"),
)
