"""Server processes of a deployment: recorded on disk, started in sessions of their own, found again, and stopped.

A record is written before its process is started, so that no process is ever lost.
"""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import psutil

from anything.keys import KEY_ENVIRONMENT, create_key, load_keys, read_key_file
from anything.router.kinds import DEFAULT_KIND, KINDS, Command, Launch, read_port_file, serve_command
from base import storage
from base.errors import (
    ERROR_FILE_VARIABLE,
    AuthenticationError,
    ConfigError,
    DataError,
    MissingFileError,
    PortInUseError,
    ServiceError,
    StorageError,
)
from base.json_lines import as_record
from tasks.processes.ports import check_port, free_port, port_in_use
from tasks.processes.process import Pid, end_tree, error_of, is_alive
from tasks.processes.programs import module_environment

GATEWAY = "gateway"
_POLL_S = 0.1
# As long as a process gets to end on SIGTERM (tasks/processes/process.py).
_STOP_GRACE_S = 15.0


@dataclass(frozen=True)
class Server:
    """One server process; `url` is empty until it is ready."""

    name: str
    pid: Pid
    created: float
    url: str
    model: str
    """Folder of the weights; the gateway's is the file of its routes, empty in records of earlier versions."""
    version: str
    kind: str = DEFAULT_KIND
    """Kind of a replica (anything/router/kinds.py), or `gateway`."""
    stop_signal: int = signal.SIGTERM
    """Signal on which it drains and ends."""

    @property
    def alive(self) -> bool:
        """Whether the process still runs."""
        return is_alive(self.pid, self.created)

    def listens_on(self, port: int) -> bool:
        """Whether it answers on the port; any is right for 0."""
        return port == 0 or self.url.endswith(f":{port}")


def _read_server(path: Path) -> Server:
    with _whole(path, "the record of a server; end that server if it runs, and remove the file"):
        if (server := as_record(Server, storage.read_json(str(path)))) is None:
            raise ValueError
        return server


@contextmanager
def _whole(path: Path, what: str) -> Iterator[None]:
    """Context in which a file of another shape is an error."""
    try:
        yield
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(f"{path}: it is damaged: it must be {what}.") from error


class ServingDirectory:
    """`<runs>/serving`: records, logs, keys and routes of the servers of these runs."""

    def __init__(self, runs_directory: str) -> None:
        self.path = Path(storage.local_path(runs_directory)).absolute() / "serving"
        self.routes = self.path / "routes.json"
        self.client_key = self.path / "key"
        """Key of clients in plain text, readable by this user only."""
        self.client_keys = self.path / "keys.json"
        self.internal_key = self.path / "internal.key"
        self.internal_keys = self.path / "internal.json"

    @property
    def _keys(self) -> tuple[tuple[Path, Path], ...]:
        """Files of each key in plain text and of its hash."""
        return (self.client_key, self.client_keys), (self.internal_key, self.internal_keys)

    def check(self, host: str, port: int) -> None:
        """Check what a release needs besides the model, before a replica is started; nothing is written.

        Args:
            host: address that the gateway shall listen on.
            port: its port, which the running gateway of these runs may have; 0 for any free one.

        Raises:
            StorageError: the directory cannot be written.
            ConfigError: a key does not fit the hashes beside it, or may be read by others; see also `check_port`.
            PortInUseError: another process listens on the port.
        """
        place = next(one for one in (self.path, *self.path.parents) if one.exists())
        if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
            raise StorageError(f"{place} cannot be written, and a release keeps its servers' records in {self.path}.")
        for plain, hashed in self._keys:
            if plain.exists():
                _check_key(plain, hashed)
        self.check_gateway_port(host, port)

    def check_gateway_port(self, host: str, port: int) -> None:
        """Check that the gateway listens on the port, or can; see `check_port` for errors."""
        gateway = self.find(GATEWAY)
        if gateway is None or not gateway.listens_on(port):
            check_port(host, port)

    def prepare(self) -> None:
        """Create the directory and its keys, readable by this user only."""
        self.path.mkdir(parents=True, exist_ok=True, mode=0o700)
        for plain, hashed in self._keys:
            if not plain.exists():
                key = create_key(str(hashed))
                descriptor = os.open(plain, os.O_CREAT | os.O_WRONLY | os.O_EXCL, 0o600)
                with os.fdopen(descriptor, "w") as handle:
                    handle.write(key + "\n")

    def servers(self) -> list[Server]:
        """All recorded servers, alive or not.

        Raises:
            DataError: a record is damaged, so that nobody knows whether its server runs.
        """
        return [_read_server(path) for path in sorted(self.path.glob("server-*.json"))]

    def find(self, name: str) -> Server | None:
        """Live server of this name, if any."""
        return next((server for server in self.servers() if server.name == name and server.alive), None)

    def find_replica(self, version: str, model: str, kind: str) -> Server | None:
        """Live replica of these weights, if any."""
        wanted = (version, model, kind)
        return next((one for one in self.servers() if (one.version, one.model, one.kind) == wanted and one.alive), None)

    def unused_name(self, version: str) -> str:
        """Name for a new replica: the version's, with a number where one of its other weights or kinds is alive."""
        taken = {server.name for server in self.servers() if server.alive}
        names = (version, *(f"{version}-{number}" for number in range(2, len(taken) + 2)))
        return next(name for name in names if name not in taken)

    def start_replica(
        self, name: str, kind: str, *, model: str, version: str, config_path: str, timeout_s: float
    ) -> Server:
        """Ready server of a model version, started through its kind; see `_start` for errors."""
        launch = Launch(
            model_uri=model,
            version=version,
            config_path=config_path,
            port=free_port(),
            port_file=str(self._port_file(name)),
            key_file=str(self.internal_keys),
            api_key_file=str(self.internal_key),
        )
        starter = KINDS[kind]
        server = Server(name, 0, 0.0, "", model, version, kind, int(starter.stop_signal))
        return self._start(server, starter.command(launch), lambda: starter.ready_url(launch), timeout_s)

    def start_gateway(self, config_path: str, *, host: str, port: int, timeout_s: float) -> Server:
        """Ready gateway in front of the routes; see `_start` for errors.

        Args:
            host: address in the config, on which it shall listen.
            port: port in the config.
        """
        port_file = str(self._port_file(GATEWAY))
        source = ("--routes", str(self.routes))
        command = serve_command(source, config_path=config_path, port_file=port_file, key_file=str(self.client_keys))
        server = Server(GATEWAY, 0, 0.0, "", str(self.routes), "", GATEWAY)
        try:
            return self._start(server, command, lambda: read_port_file(port_file), timeout_s)
        except PortInUseError as error:  # taken since the release began; a server's own text names other flags
            raise port_in_use(host, port) from error

    def _start(self, server: Server, command: Command, ready_url: Callable[[], str | None], timeout_s: float) -> Server:
        """Start a server in a session of its own, and wait until it is ready.

        Raises:
            CherryError: the server's own error when it ended (a port in use, wrong weights).
            ServiceError: it was not ready in time; it is stopped again.
        """
        log, error_file = self.path / f"{server.name}.log", self.path / f"{server.name}.error.json"
        self._port_file(server.name).unlink(missing_ok=True)
        error_file.unlink(missing_ok=True)
        self._record(server)
        environment = {**module_environment(), **command.environment, ERROR_FILE_VARIABLE: str(error_file)}
        environment.pop(KEY_ENVIRONMENT, None)
        with log.open("w") as output:
            process = subprocess.Popen(
                command.arguments, stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True
            )
        server = replace(server, pid=process.pid, created=psutil.Process(process.pid).create_time())
        self._record(server)
        deadline = time.monotonic() + timeout_s
        try:
            while (url := ready_url()) is None:
                if (code := process.poll()) is not None:
                    lines, name = log.read_text().splitlines(), f"{server.kind} server {server.name}"
                    raise error_of(code, lines, name, error_file=error_file)
                if time.monotonic() > deadline:
                    raise ServiceError(f"{server.name} was not ready after {timeout_s:g} s; its log is {log}")
                time.sleep(_POLL_S)
        except BaseException:
            self.stop(server)
            raise
        process.returncode = 0  # it outlives this process on purpose: Popen shall not warn of it
        server = replace(server, url=url)
        self._record(server)
        return server

    def stop(self, server: Server) -> None:
        """Stop a server after it drained, and remove its record."""
        if server.pid and server.alive:
            process = psutil.Process(server.pid)
            if server.stop_signal != signal.SIGTERM:
                process.send_signal(server.stop_signal)
                psutil.wait_procs([process], timeout=_STOP_GRACE_S)
            end_tree(process)
        self._file(server.name).unlink(missing_ok=True)

    def write_routes(self, weights: dict[str, float]) -> None:
        """Write routes.json with each named server's share of the traffic (percent), atomically."""
        servers = {server.name: server for server in self.servers()}
        replicas: list[dict[str, Any]] = []
        for name, weight in weights.items():
            route = {
                "name": name,
                "version": servers[name].version,
                "url": servers[name].url,
                "weight_percent": weight,
                "api_key_file": str(self.internal_key),
            }
            # Left out where it is the default: a gateway that was started before there were kinds refuses the key.
            kind = {} if servers[name].kind == DEFAULT_KIND else {"kind": servers[name].kind}
            replicas.append({**route, **kind})
        old = storage.read_json(str(self.routes)) if self.routes.exists() else {"salt": secrets.token_hex(8)}
        storage.write_json(str(self.routes), {"salt": old["salt"], "replicas": replicas})

    def weights(self) -> dict[str, float]:
        """Shares of traffic in force (percent) of the replicas that are alive.

        Raises:
            DataError: routes.json, which people may edit, is not what the gateway reads.
        """
        if not self.routes.exists():
            return {}
        with _whole(self.routes, "a list of routes; correct it, or start the release again"):
            replicas = storage.read_json(str(self.routes))["replicas"]
            shares = {str(one["name"]): float(one["weight_percent"]) for one in replicas}
        return {name: share for name, share in shares.items() if self.find(name) is not None}

    def _record(self, server: Server) -> None:
        storage.write_json(str(self._file(server.name)), asdict(server))

    def _file(self, name: str) -> Path:
        return self.path / f"server-{name}.json"

    def _port_file(self, name: str) -> Path:
        return self.path / f"{name}.port"


def _check_key(plain: Path, hashed: Path) -> None:
    try:
        key = load_keys(str(hashed)).find(read_key_file(str(plain)))
    except (AuthenticationError, MissingFileError) as error:
        raise ConfigError(
            f"{plain}: its key is not one of {hashed}, so no server would take it. Remove {plain}: the release makes "
            "a new key."
        ) from error
    if key.revoked:
        raise ConfigError(f"{plain}: its key was revoked. Remove {plain}: the release makes a new key.")


def stop_serving(runs_directory: str) -> list[str]:
    """Names of the servers of a runs directory that were alive; all are stopped, the gateway first."""
    directory = ServingDirectory(runs_directory)
    servers = sorted(directory.servers(), key=lambda server: server.name != GATEWAY)
    alive = [server.name for server in servers if server.alive]
    for server in servers:
        directory.stop(server)
    directory.routes.unlink(missing_ok=True)
    return alive
