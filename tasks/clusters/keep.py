"""Kept clusters: hosts that are taken for a person, and stay until they are given back or their time is over."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path

from base import storage
from base.config import dump
from base.errors import CherryError, ConfigError, storage_errors
from cherry.cluster import LOCAL, SLURM, SSH, ClusterSpec, NodeSpec, read_cluster
from tasks.clusters.give_back import release_kept
from tasks.lease import locked, remove_lock_file
from tasks.providers.protocol import (
    CLUSTER_FILE,
    HOSTS_FILE,
    KEPT_FOLDER,
    RESERVATION_FILE,
    Hosts,
    Reservation,
    read_hosts,
    read_reservation,
    write_hosts,
    write_reservation,
)
from tasks.providers.registry import find_provider, reserve

_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")


def take(cluster: str, runs_directory: Path, *, name: str | None, nodes: int | None) -> tuple[Path, Hosts, bool]:
    """Directory of a kept cluster, its hosts, and whether they were taken now; else they were held already.

    Args:
        cluster: path of a cluster file, or `local`.
        name: what it is to be called; `None` goes by the file.
        nodes: hosts to take; `None` takes all that the file has, without spares.

    Raises:
        MissingFileError, ConfigError: the file, the name or the number is wrong, or the name is of another cluster.
        CherryError: see `tasks.providers.protocol.Provider`; what was taken by then is given back.
    """
    spec = read_cluster(cluster)
    name = Path(cluster).stem if name is None else name
    if not _NAME.fullmatch(name):
        rule = "must be lower-case letters, digits and dashes, at most 63, and begin with a letter or a digit"
        raise ConfigError(f"--name: {rule} (got {name!r})")
    if nodes is not None and not 1 <= nodes <= spec.node_count:
        raise ConfigError(f"--nodes: must be from 1 to {spec.node_count}, the nodes of {cluster} (got {nodes})")
    directory = runs_directory.resolve() / KEPT_FOLDER / name
    taken_nodes = spec.node_count if nodes is None else nodes
    asked = reserve(cluster, spec, str(directory), f"kept-{name}", nodes=taken_nodes, ranks_per_node=spec.node_gpus)
    if asked.provider == SLURM:
        raise ConfigError(
            f"{cluster}: Slurm gives nodes to jobs, and a run submits its own, so there is nothing to hold. Start the "
            f"run; `cherry cluster render CONFIG cluster={cluster}` shows its job."
        )
    provider = find_provider(asked.provider)
    if not (directory / RESERVATION_FILE).exists():
        provider.check(asked)  # before anything is written
    with storage_errors(str(directory)):
        directory.mkdir(parents=True, exist_ok=True)
    with locked(directory):
        held = read_reservation(directory)
        if held is not None and _is_same(held, asked) and (directory / HOSTS_FILE).exists():
            hosts = read_hosts(directory)
            if provider.is_alive(hosts):
                return directory, hosts, False
        elif held is not None and not _is_same(held, asked):
            raise ConfigError(
                f"{name}: is held with other values, of {held.cluster}. Give it back first (`cherry cluster down "
                f"{name}`), or take another name (--name)."
            )
        return directory, _take_anew(directory, held, asked), True


def _is_same(held: Reservation, asked: Reservation) -> bool:
    ours = {"owner", "since", "until", "cluster"}
    return held.model_dump(exclude=ours) == asked.model_dump(exclude=ours)


def _take_anew(directory: Path, held: Reservation | None, asked: Reservation) -> Hosts:
    """The hosts, after giving back those of an earlier reservation, which are gone. Call it under the lock."""
    provider = find_provider(asked.provider)
    if held is not None:
        release_kept(directory)
    write_reservation(directory, asked)
    try:
        hosts = provider.acquire(asked)
        write_hosts(directory, hosts)
        if asked.provider not in (LOCAL, SSH):
            spec = cluster_of(hosts, asked.spec)
            storage.write_bytes(str(directory / CLUSTER_FILE), dump(spec).encode())
    except BaseException:
        with suppress(CherryError):  # its record stays, for `down` and the reaper
            release_kept(directory)
            remove_lock_file(directory)
        raise
    return hosts


def cluster_of(hosts: Hosts, spec: ClusterSpec) -> ClusterSpec:
    """Spec that names these hosts, by which runs reach them over ssh."""
    nodes = tuple(NodeSpec(host=host.address) for host in hosts.hosts)
    return spec.model_copy(update={"provider": SSH, "nodes": nodes, "gpus_per_node": hosts.ranks_per_node})
