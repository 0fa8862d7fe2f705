"""Provider registry: the built-in providers, and those that installed packages add.

A package adds one by an entry point of the group `cherry.providers`, whose name a cluster's spec gives as `provider`
and which leads to a class without arguments.
"""

from __future__ import annotations

import difflib
import getpass
import os
import socket
import time
from collections.abc import Callable
from importlib.metadata import entry_points

from base.errors import ConfigError
from cherry.cluster import LOCAL, SKY, SKY_IS_RENDERED, SLURM, SSH, ClusterSpec
from cherry.remote.prepared_data import check_apart
from tasks.providers.local import LocalProvider
from tasks.providers.protocol import Provider, Reservation
from tasks.providers.slurm import SlurmProvider
from tasks.run_config import RunConfig

ENTRY_POINTS = "cherry.providers"


def _ssh() -> Provider:
    from tasks.providers.ssh import SshProvider  # asyncssh takes half a second, which a local run does not wait for

    return SshProvider()


_BUILT_IN: dict[str, Callable[[], Provider]] = {LOCAL: LocalProvider, SLURM: SlurmProvider, SSH: _ssh}
_DAY_S = 86_400.0
# What is there anyway costs nothing while it is held; what is handed out is paid for, or waited for by others.
# Slurm has time limits of its own, after which a job is queued again.
_LIFETIME_S = {LOCAL: 30 * _DAY_S, SLURM: 30 * _DAY_S, SSH: 30 * _DAY_S}
_OTHERS_LIFETIME_S = _DAY_S


def known_providers() -> list[str]:
    """Names of all providers that can be used here."""
    return sorted({*_BUILT_IN, *(entry.name for entry in entry_points(group=ENTRY_POINTS))})


def find_provider(name: str) -> Provider:
    """The provider of that name.

    Raises:
        ConfigError: it is not installed.
    """
    if name in _BUILT_IN:
        return _BUILT_IN[name]()
    found = next(iter(entry_points(group=ENTRY_POINTS, name=name)), None)
    if found is None:
        raise ConfigError(
            f"provider: no provider {name!r} is installed; known are {', '.join(known_providers())}. "
            "Install the package that has it, or take another cluster."
        )
    make: Callable[[], Provider] = found.load()
    return make()


def _meant(name: str) -> str:
    close = difflib.get_close_matches(name, known_providers(), n=1)
    return f" Did you mean {close[0]}?" if close else ""


def provider_name(cluster: str, spec: ClusterSpec) -> str:
    """Name of the provider that takes a cluster's hosts.

    Args:
        cluster: what the configuration calls it, for the error.

    Raises:
        ConfigError: the spec is for plans or for `cherry cluster render` only, or names a provider that is not
            installed.
    """
    if spec.kind == LOCAL:
        return LOCAL
    if spec.provider == SKY:
        raise ConfigError(f"cluster: {cluster}: {SKY_IS_RENDERED}")
    name = spec.provider or (SSH if spec.named else None)
    if name is None:
        raise ConfigError(
            f"cluster: {cluster} names no provider, so a flow can plan for it but not take its hosts (known providers: "
            f"{', '.join(known_providers())}). Name its nodes, or give its spec a provider."
        )
    if name not in known_providers():
        raise ConfigError(
            f"cluster: {cluster} needs provider {name!r}, which is not installed (known providers: "
            f"{', '.join(known_providers())}).{_meant(name)} Install the package that has it, or take another cluster."
        )
    return name


def lifetime_s(provider: str, spec: ClusterSpec) -> float:
    """Seconds for which hosts of a cluster are held at most."""
    return spec.max_lifetime or _LIFETIME_S.get(provider, _OTHERS_LIFETIME_S)


def reservation_of(
    config: RunConfig, spec: ClusterSpec, run_directory: str, name: str, *, memory_bytes_per_node: int = 0
) -> Reservation:
    """Reservation of the hosts that a run's launch asks for; see `reserve`.

    Raises:
        ConfigError: see `provider_name`; or the hosts share no file system, and lack a path that the run names.
    """
    launch = config.launch
    if spec.ssh.runs_directory is not None:
        check_apart(config, config.cluster)
    asked = reserve(
        config.cluster, spec, run_directory, name, nodes=launch.nnodes, ranks_per_node=launch.nproc_per_node
    )
    changes = {"master_port": launch.master_port, "memory_bytes_per_node": memory_bytes_per_node}
    return asked.model_copy(update=changes)


def reserve(
    cluster: str, spec: ClusterSpec, directory: str, name: str, *, nodes: int, ranks_per_node: int
) -> Reservation:
    """Reservation of hosts for their maximum lifetime from now on, in this user's name. Nothing is written or taken.

    Args:
        cluster: what the spec is called, for errors and lists.
        directory: where the reservation is to be written.
        name: unique to the directory.

    Raises:
        ConfigError: see `provider_name`.
    """
    provider, now = provider_name(cluster, spec), time.time()
    return Reservation(
        provider=provider,
        cluster=cluster,
        spec=spec,
        name=name,
        run_directory=directory,
        nodes=nodes,
        ranks_per_node=ranks_per_node,
        master_port=None,
        memory_bytes_per_node=0,
        owner=f"{_user()}@{socket.gethostname()}",
        since=now,
        until=now + lifetime_s(provider, spec),
    )


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container may run as a number that no user has
        return str(os.getuid())
