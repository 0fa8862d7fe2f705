"""Provider registry: the built-in providers, and those that installed packages add.

A package adds one by an entry point of the group `cherry.providers`, whose name a cluster's spec gives as `provider`
and which leads to a class without arguments.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import entry_points

from base.errors import ConfigError
from cherry.cluster import LOCAL, ClusterSpec
from tasks.providers.local import LocalProvider
from tasks.providers.protocol import Provider

ENTRY_POINTS = "cherry.providers"
_BUILT_IN: dict[str, Callable[[], Provider]] = {LOCAL: LocalProvider}


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


def provider_name(cluster: str, spec: ClusterSpec) -> str:
    """Name of the provider that takes a cluster's hosts.

    Args:
        cluster: what the configuration calls it, for the error.

    Raises:
        ConfigError: the spec is for plans only, or names a provider that is not installed.
    """
    if spec.kind == LOCAL:
        return LOCAL
    if spec.provider is None:
        raise ConfigError(
            f"cluster: {cluster} names no provider, so a flow can plan for it but not take its hosts (known providers: "
            f"{', '.join(known_providers())}). Give its spec a provider, or start cherry-launch on its nodes."
        )
    if spec.provider not in known_providers():
        raise ConfigError(
            f"cluster: {cluster} needs provider {spec.provider!r}, which is not installed (known providers: "
            f"{', '.join(known_providers())}). Install the package that has it, or take another cluster."
        )
    return spec.provider
