"""Local provider: this machine as a cluster of one host. The run directory's lease alone reserves it."""

from __future__ import annotations

import os
from collections.abc import Sequence

import psutil

from base.errors import ConfigError, OperationalError
from cherry.planner.local_device import local_gpus
from tasks.processes.programs import module_command
from tasks.providers.protocol import Host, Hosts, Reservation

_GIB = 2**30


class LocalProvider:
    """This machine; see `tasks.providers.protocol.Provider`."""

    def check(self, reservation: Reservation) -> None:
        """Check that one host is asked for, with GPUs or slots for the ranks, and free memory for ranks on its CPU.

        Raises:
            ConfigError: more hosts, GPUs or slots than this machine has.
            OperationalError: memory is short now, but may be freed.
        """
        cluster, ranks = reservation.cluster, reservation.ranks_per_node
        if reservation.nodes != 1:
            raise ConfigError(
                f"launch.nnodes: cluster {cluster!r} has one node, this machine (got {reservation.nodes}). "
                "Name a larger cluster's file: cluster=FILE, like those in configs/clusters/. What it needs there, and "
                "what it costs, tells `cherry plan CONFIG --cluster FILE`."
            )
        gpus = len(local_gpus())
        if gpus and ranks > gpus:
            raise ConfigError(f"launch.nproc_per_node: this machine has {gpus} GPUs (got {ranks})")
        if reservation.spec.slots is not None and ranks > reservation.spec.slots:
            slots = reservation.spec.slots
            raise ConfigError(f"launch.nproc_per_node: cluster {cluster} has {slots} slots (got {ranks})")
        free, needed = psutil.virtual_memory().available, reservation.memory_bytes_per_node
        if not gpus and needed > free:
            raise OperationalError(
                f"memory: by the plan {ranks} ranks need {needed / _GIB:.1f} GiB here, {free / _GIB:.1f} GiB are free. "
                "Free some, or take a smaller model."
            )

    def acquire(self, reservation: Reservation) -> Hosts:
        """This machine as it is now."""
        host = Host(
            address="127.0.0.1",
            cores=os.cpu_count() or 1,
            gpus=len(local_gpus()),
            memory_gib=psutil.virtual_memory().available / _GIB,
        )
        return Hosts(
            provider=reservation.provider,
            cluster=reservation.cluster,
            hosts=(host,),
            ranks_per_node=reservation.ranks_per_node,
            master_addr=host.address,
            master_port=reservation.master_port,
        )

    def is_alive(self, hosts: Hosts) -> bool:
        """True: the caller runs on this machine."""
        return True

    def commands(self, hosts: Hosts, arguments: Sequence[str]) -> list[list[str]]:
        """Command of this environment's launcher."""
        return [module_command("cherry.launcher", [*hosts.launcher_flags(0), *arguments])]

    def release(self, reservation: Reservation) -> None:
        """Do nothing: no host was taken from anyone."""
