"""Replica kinds: how a server of each kind is started, checked for readiness, connected to and stopped.

A deployment starts a replica through its kind, and the router connects to it through the same. Another engine is a
class here and a line in `KINDS`.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from anything.protocol import Engine
from base import storage


@dataclass(frozen=True)
class Launch:
    """Parameters of a new server: what it serves, and the files and port reserved for it."""

    model_uri: str
    version: str
    """Label of the model version."""
    config_path: str
    """YAML with a `serve` section."""
    port: int
    """A port that was free; a kind may let the server pick another one."""
    port_file: str
    """File to which the server may write its URL once it is ready; absent before."""
    key_file: str
    """Hashes of the keys to accept (see anything/keys.py)."""
    api_key_file: str
    """The key that requests will carry, in plain text."""


@dataclass(frozen=True)
class Command:
    """Command line of a server, and what its environment has besides the starter's.

    The starter's environment is one in which this project's packages are found.
    """

    arguments: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)


class ReplicaKind(Protocol):
    """A kind of server."""

    @property
    def stop_signal(self) -> signal.Signals:
        """Signal on which a server drains and ends."""

    def command(self, launch: Launch) -> Command:
        """Command that starts a server in the foreground."""

    def ready_url(self, launch: Launch) -> str | None:
        """Base URL of the server once it is healthy, `None` while it starts; asked several times a second."""

    def connect(self, url: str, api_key_file: str, version: str) -> Engine:
        """Engine that forwards to the server at `url` and labels its chunks with `version`."""


class EmbeddedKind:
    """`anything serve` with the embedded engine."""

    stop_signal = signal.SIGTERM

    def command(self, launch: Launch) -> Command:
        """`anything serve --model_path`, on a port of its own choice."""
        source = ("--model_path", launch.model_uri, "--model_version", launch.version, "--port", "0")
        return serve_command(
            source, config_path=launch.config_path, port_file=launch.port_file, key_file=launch.key_file
        )

    def ready_url(self, launch: Launch) -> str | None:
        """URL in the port file, which the server writes when the model is loaded."""
        return read_port_file(launch.port_file)

    def connect(self, url: str, api_key_file: str, version: str) -> Engine:
        """Remote engine over this project's own HTTP API."""
        from anything.router.remote_engine import RemoteEngine

        return RemoteEngine(url, api_key_file, version)


KINDS: dict[str, ReplicaKind] = {"embedded": EmbeddedKind()}
DEFAULT_KIND = "embedded"


def kind_rule() -> str:
    """The rule for a kind's name, for error messages."""
    return f"must be one of {', '.join(sorted(KINDS))}"


def serve_command(source: tuple[str, ...], *, config_path: str, port_file: str, key_file: str) -> Command:
    """Command of `anything serve` for a model or for routes.

    Args:
        source: `--model_path` or `--routes`, and other flags of `anything serve`.
    """
    files = ("--config", config_path, "--port_file", port_file, "--key_file", key_file)
    # Without -P, a package called `model` in the working directory would be taken for this project's.
    return Command((sys.executable, "-P", "-m", "anything.cli", "serve", *source, *files))


def read_port_file(path: str) -> str | None:
    """URL in a port file of `anything serve`, `None` before it is there."""
    return str(storage.read_json(path)["url"]) if os.path.exists(path) else None
