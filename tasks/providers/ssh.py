"""SSH provider: hosts that a cluster file names, reached over ssh. Nobody hands them out, so nothing is reserved."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from base import storage
from base.config import dump
from base.errors import CherryError, ConfigError
from cherry.cluster import ClusterSpec
from cherry.remote.gather import choose, gather
from cherry.remote.job import Job
from tasks.processes.programs import module_command
from tasks.providers.protocol import CLUSTER_FILE, Host, Hosts, Reservation, held_reservation


class SshProvider:
    """Given hosts; see `tasks.providers.protocol.Provider`."""

    def check(self, reservation: Reservation) -> None:
        """Check that enough hosts answer with the right host key, and are fit: versions, GPUs, clock, network, disk.

        Raises:
            ConfigError: there are too few, and a reason is for the caller to mend; the text names each such host.
            OperationalError: there are too few now.
        """
        named = len(reservation.spec.named)
        if reservation.nodes > named:
            raise ConfigError(
                f"launch.nnodes: cluster {reservation.cluster!r} names {named} nodes (got {reservation.nodes})"
            )
        _fit_hosts(reservation)

    def acquire(self, reservation: Reservation) -> Hosts:
        """The hosts that are fit now, or spares in place of those that are not.

        Raises:
            ConfigError, OperationalError: see `check`.
        """
        hosts = _fit_hosts(reservation)
        directory = Path(reservation.run_directory)
        storage.write_bytes(str(directory / CLUSTER_FILE), dump(reservation.spec).encode())
        return Hosts(
            provider=reservation.provider,
            cluster=reservation.cluster,
            hosts=tuple(hosts),
            ranks_per_node=reservation.ranks_per_node,
            master_addr=hosts[0].address,
            master_port=None,
            allocation=reservation.run_directory,
        )

    def is_alive(self, hosts: Hosts) -> bool:
        """Whether enough of the cluster's hosts are fit, be they these or spares."""
        try:
            return bool(_fit_hosts(held_reservation(hosts)))
        except CherryError:
            return False

    def commands(self, hosts: Hosts, arguments: Sequence[str]) -> list[list[str]]:
        """Command of the supervisor, which starts the launcher on every host, and again when one is lost.

        Raises:
            ConfigError: the hosts were released.
        """
        reservation = held_reservation(hosts)
        flags = [f"--cluster={Path(reservation.run_directory) / CLUSTER_FILE}", f"--nnodes={reservation.nodes}"]
        flags += [f"--nproc_per_node={reservation.ranks_per_node}"]
        return [module_command("cherry.remote.supervisor", [*flags, *arguments])]

    def release(self, reservation: Reservation) -> None:
        """Do nothing: whatever ran on the hosts ended with its supervisor, and nothing else was taken."""


def _fit_hosts(reservation: Reservation) -> list[Host]:
    """Hosts that a job would take now."""
    job = Job(reservation.spec, reservation.nodes, reservation.ranks_per_node, ("--run_dir", reservation.run_directory))
    # A loop of its own: the caller's thread may have one that runs.
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, _ask(job, reservation.spec)).result()


async def _ask(job: Job, spec: ClusterSpec) -> list[Host]:
    gathered = await gather(job)
    try:
        found = []
        for session in choose(job, gathered, Counter()):
            facts = session.facts
            assert facts is not None
            address = facts.address(spec.communication.interface) or session.node.host
            gpus = facts.gpus if session.node.gpus is None else len(session.node.gpus)
            found.append(Host(address=address, cores=facts.cores, gpus=gpus, memory_gib=facts.memory_gib))
        return found
    finally:
        await gathered.close()
