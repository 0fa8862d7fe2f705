"""Owns the server processes of a deployment: recorded on disk, started apart from the flow, found again, and stopped.

It knows nothing of versions or traffic. A record is written before its process is started, so that none is ever lost.
"""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from anything.keys import create_key
from base import storage
from base.errors import ServiceError
from tasks.process import PROJECT_ROOT, end_tree, error_of, is_alive

GATEWAY = "gateway"
_POLL_S = 0.1


@dataclass(frozen=True)
class Server:
    """One server process; `url` is empty until it is ready."""

    name: str
    pid: int
    created: float
    url: str
    model: str
    version: str

    @property
    def alive(self) -> bool:
        """Whether the process still runs."""
        return is_alive(self.pid, self.created)


class ServingDirectory:
    """`<runs>/serving`: records, logs, keys and routes of what is served from these runs."""

    def __init__(self, runs_directory: str) -> None:
        self.path = Path(storage.local_path(runs_directory)).absolute() / "serving"
        self.routes = self.path / "routes.json"
        self.client_key = self.path / "key"
        """The clients' key in plain text, for this user only."""
        self.client_keys = self.path / "keys.json"
        self.internal_key = self.path / "internal.key"
        self.internal_keys = self.path / "internal.json"

    def prepare(self) -> None:
        """Make the directory and its keys, for this user's eyes only."""
        self.path.mkdir(parents=True, exist_ok=True, mode=0o700)
        for plain, hashed in ((self.client_key, self.client_keys), (self.internal_key, self.internal_keys)):
            if not plain.exists():
                key = create_key(str(hashed))
                descriptor = os.open(plain, os.O_CREAT | os.O_WRONLY | os.O_EXCL, 0o600)
                with os.fdopen(descriptor, "w") as handle:
                    handle.write(key + "\n")

    def servers(self) -> list[Server]:
        """Every recorded server, alive or not."""
        records = sorted(self.path.glob("server-*.json"))
        return [Server(**storage.read_json(str(path))) for path in records]

    def find(self, name: str) -> Server | None:
        """A live server by name."""
        return next((server for server in self.servers() if server.name == name and server.alive), None)

    def start(
        self, name: str, arguments: list[str], *, keys: Path, model: str, version: str, timeout_s: float
    ) -> Server:
        """Start `anything serve` in a session of its own, and wait until it is ready.

        Raises:
            CherryError: the server's own error when it ended (a port in use, wrong weights).
            ServiceError: it was not ready in time; it is stopped again.
        """
        port_file, log = self.path / f"{name}.port", self.path / f"{name}.log"
        port_file.unlink(missing_ok=True)
        self._record(Server(name, 0, 0.0, "", model, version))
        command = [sys.executable, "-m", "anything.cli", "serve", *arguments]
        command += ["--port_file", str(port_file), "--key_file", str(keys)]
        environment = {**os.environ, "PYTHONPATH": str(PROJECT_ROOT)}
        environment.pop("ANYTHING_API_KEY", None)
        with log.open("w") as output:
            process = subprocess.Popen(
                command, stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True
            )
        server = Server(name, process.pid, psutil.Process(process.pid).create_time(), "", model, version)
        self._record(server)
        deadline = time.monotonic() + timeout_s
        try:
            while not port_file.exists():
                if (code := process.poll()) is not None:
                    raise error_of(code, log.read_text().splitlines(), f"anything serve ({name})")
                if time.monotonic() > deadline:
                    raise ServiceError(f"{name} was not ready after {timeout_s:g} s; its log is {log}")
                time.sleep(_POLL_S)
        except BaseException:
            self.stop(server)
            raise
        process.returncode = 0  # it outlives this process on purpose: Popen shall not warn of it
        ready = Server(**{**asdict(server), "url": storage.read_json(str(port_file))["url"]})
        self._record(ready)
        return ready

    def stop(self, server: Server) -> None:
        """Stop a server, letting it drain, and drop its record."""
        if server.pid and server.alive:
            end_tree(psutil.Process(server.pid))
        self._file(server.name).unlink(missing_ok=True)

    def write_routes(self, weights: dict[str, float]) -> None:
        """Give each named server its share of the traffic, in one atomic write."""
        servers = {server.name: server for server in self.servers()}
        replicas: list[dict[str, Any]] = [
            {
                "name": name,
                "version": servers[name].version,
                "url": servers[name].url,
                "weight_percent": weight,
                "api_key_file": str(self.internal_key),
            }
            for name, weight in weights.items()
        ]
        old = storage.read_json(str(self.routes)) if self.routes.exists() else {"salt": secrets.token_hex(8)}
        storage.write_json(str(self.routes), {"salt": old["salt"], "replicas": replicas})

    def weights(self) -> dict[str, float]:
        """The shares in force, of replicas that are alive."""
        if not self.routes.exists():
            return {}
        replicas = storage.read_json(str(self.routes))["replicas"]
        return {r["name"]: float(r["weight_percent"]) for r in replicas if self.find(r["name"]) is not None}

    def _record(self, server: Server) -> None:
        storage.write_json(str(self._file(server.name)), asdict(server))

    def _file(self, name: str) -> Path:
        return self.path / f"server-{name}.json"


def stop_serving(runs_directory: str) -> list[str]:
    """Stop every server of a runs directory, the gateway first; the names of those that were alive."""
    directory = ServingDirectory(runs_directory)
    servers = sorted(directory.servers(), key=lambda server: server.name != GATEWAY)
    alive = [server.name for server in servers if server.alive]
    for server in servers:
        directory.stop(server)
    directory.routes.unlink(missing_ok=True)
    return alive
