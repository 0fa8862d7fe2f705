"""A provider as another package adds one: its hosts are loopback addresses of this machine, a launcher on each.

It keeps its allocations in a folder beside the runs, by the reservation's name, and a line of each call in `calls`.
An address below `.invalid` cannot be had.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from base.errors import ConfigError, OperationalError
from tasks.providers.protocol import Host, Hosts, Reservation


class TwoHosts:
    """Stateless, as the protocol asks: everything is found by the reservation."""

    def check(self, reservation: Reservation) -> None:
        there = len(reservation.spec.named)
        if reservation.nodes > there:
            raise ConfigError(f"launch.nnodes: {reservation.cluster} has {there} hosts (got {reservation.nodes})")

    def acquire(self, reservation: Reservation) -> Hosts:
        folder = allocation(reservation)
        assert (Path(reservation.run_directory) / "reservation.json").exists(), "recorded before it is taken"
        folder.mkdir(parents=True)
        note(reservation, "acquire")
        addresses = [node.host for node in reservation.spec.named[: reservation.nodes]]
        for address in addresses:
            if address.endswith(".invalid"):
                raise OperationalError(f"{address} does not answer")
            (folder / address).touch()
        return Hosts(
            provider=reservation.provider,
            cluster=reservation.cluster,
            hosts=tuple(Host(address=address, cores=1, gpus=0, memory_gib=1.0) for address in addresses),
            ranks_per_node=reservation.ranks_per_node,
            master_addr=addresses[0],
            master_port=reservation.master_port,
            allocation=str(folder),
        )

    def is_alive(self, hosts: Hosts) -> bool:
        assert hosts.allocation is not None
        return all((Path(hosts.allocation) / host.address).exists() for host in hosts.hosts)

    def commands(self, hosts: Hosts, arguments: Sequence[str]) -> list[list[str]]:
        start = [sys.executable, "-m", "cherry.launcher"]
        return [[*start, *hosts.launcher_flags(rank), *arguments] for rank in range(len(hosts.hosts))]

    def release(self, reservation: Reservation) -> None:
        folder = allocation(reservation)
        if folder.exists():
            for taken in folder.iterdir():
                taken.unlink()
            folder.rmdir()
        note(reservation, "release")


def allocation(reservation: Reservation) -> Path:
    return Path(reservation.run_directory).parent / "allocations" / reservation.name


def note(reservation: Reservation, call: str) -> None:
    with (Path(reservation.run_directory).parent / "calls").open("a") as calls:
        calls.write(f"{call} {reservation.name}\n")
