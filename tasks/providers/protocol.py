"""Provider protocol: how the hosts of a run are taken and released; its records `reservation.json` and `hosts.json`.

A provider is stateless: everything that it needs to release hosts stands in the reservation, which is written before
the hosts are taken, so that another process can release them after a crash.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, TypeVar

from pydantic import BaseModel, ConfigDict, NonNegativeFloat, NonNegativeInt, PositiveInt, ValidationError

from base import storage
from base.errors import ConfigError
from cherry.cluster import ClusterSpec

RESERVATION_FILE = "reservation.json"
"""File in the run directory, from before hosts are taken until they are released."""
HOSTS_FILE = "hosts.json"
CLUSTER_FILE = "cluster.yaml"
"""File beside them, on given hosts and under Slurm: the cluster's spec as it was when its hosts were taken."""

KEPT_FOLDER = "_clusters"
"""Folder of a runs directory with a folder for each cluster that `cherry cluster up` holds."""


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


_R = TypeVar("_R", bound=_Record)


class Host(_Record):
    """One host of a run, and what was free on it when it was taken."""

    address: str
    """Address by which the other hosts reach it."""
    cores: PositiveInt
    gpus: NonNegativeInt
    memory_gib: NonNegativeFloat


class Reservation(_Record):
    """Hosts that a run asks a provider for."""

    provider: str
    cluster: str
    """Path of the cluster's spec, or `local`."""
    spec: ClusterSpec
    name: str
    """Name of the provider's allocation, unique to the run directory, so that it is found again by name alone."""
    run_directory: str
    nodes: PositiveInt
    ranks_per_node: PositiveInt
    master_port: PositiveInt | None
    memory_bytes_per_node: NonNegativeInt
    """Host memory that the ranks of a node take at their peak; 0 where that is not known, or is a GPU's."""
    owner: str | None = None
    """Who asked: user and host."""
    since: NonNegativeFloat | None = None
    """Unix time at which the hosts were asked for."""
    until: NonNegativeFloat | None = None
    """Unix time at which they are given back at the latest."""


class Hosts(_Record):
    """The hosts of a run; the one of rank 0 comes first."""

    provider: str
    cluster: str
    hosts: tuple[Host, ...]
    ranks_per_node: PositiveInt
    master_addr: str
    master_port: PositiveInt | None
    """`None` lets the launcher pick a free port, on one host."""
    allocation: str | None = None
    """The provider's own identifier of the allocation: a job's or a cluster's."""

    def launcher_flags(self, node_rank: int) -> list[str]:
        """Flags of `cherry-launch` on one of the hosts."""
        flags = [f"--nproc_per_node={self.ranks_per_node}", f"--nnodes={len(self.hosts)}"]
        if len(self.hosts) > 1:
            flags += [f"--node_rank={node_rank}", f"--master_addr={self.master_addr}"]
        return flags if self.master_port is None else [*flags, f"--master_port={self.master_port}"]


class Provider(Protocol):
    """A kind of cluster. All methods may be called from any process, in any order."""

    def check(self, reservation: Reservation) -> None:
        """Check that the cluster has the hosts of a reservation; takes nothing.

        Raises:
            ConfigError: the cluster never has these hosts.
            OperationalError: it does not have them now.
        """
        ...

    def acquire(self, reservation: Reservation) -> Hosts:
        """Take the hosts and wait until they answer.

        Raises:
            OperationalError: they are not available now; those taken meanwhile are found by the reservation's name.
        """
        ...

    def is_alive(self, hosts: Hosts) -> bool:
        """Whether all hosts are still held and answer; called before each launch."""
        ...

    def commands(self, hosts: Hosts, arguments: Sequence[str]) -> list[list[str]]:
        """Commands to run on this machine that together start `cherry-launch` on every host, rank 0's first.

        One command may start them all, as a supervisor does.

        Args:
            arguments: the training program and its own arguments, after the launcher's flags.
        """
        ...

    def release(self, reservation: Reservation) -> None:
        """Release the hosts of a reservation, of which none, some or all were taken. Calling it again does nothing.

        Raises:
            OperationalError: the cluster could not be reached; it is tried again at the run's next start.
        """
        ...


def write_reservation(run_directory: Path, reservation: Reservation) -> None:
    """Write reservation.json."""
    storage.write_json(str(run_directory / RESERVATION_FILE), reservation.model_dump(mode="json"))


def read_reservation(run_directory: Path) -> Reservation | None:
    """Reservation of the run directory's hosts; `None` when it holds none.

    Raises:
        ConfigError: the file is not a reservation.
    """
    path = run_directory / RESERVATION_FILE
    return _read(path, Reservation) if path.exists() else None


def held_reservation(hosts: Hosts) -> Reservation:
    """The reservation that hosts were taken by, where `allocation` is the run directory.

    Raises:
        ConfigError: they were released.
    """
    found = None if hosts.allocation is None else read_reservation(Path(hosts.allocation))
    if found is None:
        raise ConfigError(f"the hosts of {hosts.cluster} were released; take them again by starting the run again")
    return found


def write_hosts(run_directory: Path, hosts: Hosts) -> str:
    """Path of hosts.json, after writing it."""
    path = str(run_directory / HOSTS_FILE)
    storage.write_json(path, hosts.model_dump(mode="json"))
    return path


def read_hosts(run_directory: Path) -> Hosts:
    """The hosts that provision wrote.

    Raises:
        MissingFileError, ConfigError: there is no hosts.json, or it is not one.
    """
    return _read(run_directory / HOSTS_FILE, Hosts)


def _read(path: Path, kind: type[_R]) -> _R:
    try:
        return kind.model_validate_json(storage.read_bytes(str(path)))
    except ValidationError as error:
        differing = "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors()[:5])
        advice = "Remove it and start the run again."
        if path.parent.parent.name == KEPT_FOLDER:  # no run is to be started that would give its hosts back
            advice = (
                f"Give back what the cluster {path.parent.name} still holds at its provider (given hosts: nothing), "
                f"remove {path.parent}, and take it again (cherry cluster up)."
            )
        raise ConfigError(f"{path}: is not what this version of cherry writes ({differing}). {advice}") from error
