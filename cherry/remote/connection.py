"""Connections to hosts: one ssh connection each, with an agent at its other end."""

from __future__ import annotations

import asyncio
import json
import shlex
import socket
import sys
import sysconfig
import time
from collections import deque
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import asyncssh

from base.errors import CherryError, ConfigError, WorkerLostError, error_of_code, error_of_record
from base.json_lines import parse_lines
from cherry.cluster import NodeSpec, SshConfig
from cherry.remote.agent import KILL_S
from cherry.remote.facts import PACKAGES_FOLDER, HostFacts
from cherry.remote.reach import Place

LEASE_S = 10.0
"""Seconds for which a host's ranks go on without hearing from the supervisor."""
LEASE_MARGIN_S = 2.0
"""Seconds more: clocks of two hosts run at unlike rates, and a process may wait for a core."""
# A host that is gone is noticed after 6 to 8 s (measured, power loss and partition, 2026-11-28).
_KEEPALIVE_S, _KEEPALIVES = 2, 3
# A connection takes 0.2 s, 32 at a time 1.2 s (measured, 2026-11-28); a host that is off never answers.
_CONNECT_S = 6.0
# Importing the agent on a host that is busy.
_ANSWER_S = 60.0
_KEPT_LINES = 20


class Session:
    """An agent on a host, and what was heard from it. Make one by `open_session`."""

    def __init__(
        self, node: NodeSpec, connection: asyncssh.SSHClientConnection, process: asyncssh.SSHClientProcess[bytes]
    ) -> None:
        self.node = node
        self._connection, self._process = connection, process
        self._tick: float | None = None
        self._promised_until = time.monotonic()
        self.facts: HostFacts | None = None
        self.asked_at: float | None = None
        """Unix time here when the facts came."""
        self.errors: deque[str] = deque(maxlen=_KEPT_LINES)
        """Last lines of the agent's standard error."""
        self._messages: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()
        self._reading = [asyncio.create_task(read()) for read in (self._read_messages, self._read_errors)]

    @property
    def gone_at(self) -> float:
        """Time (monotonic) from which no rank runs on the host, though nothing is heard from it."""
        return self._promised_until + KILL_S + LEASE_MARGIN_S

    def send(self, **message: Any) -> None:
        """Send a message, or nothing where the connection is lost."""
        with suppress(OSError, asyncssh.Error):
            self._process.stdin.write(json.dumps(message).encode() + b"\n")

    def start(self, arguments: Sequence[str], environment: Mapping[str, str]) -> None:
        """Start the launcher on the host.

        Args:
            arguments: the launcher's, with the training program and its own.
            environment: variables for it, over those that the host has.
        """
        order = {"arguments": list(arguments), "environment": dict(environment), "lease_s": LEASE_S, "tock": self._tick}
        self._promised_until = time.monotonic() + LEASE_S
        self.send(start=order)

    async def messages(self) -> AsyncIterator[dict[str, Any]]:
        """Messages of the agent, but for its ticks, until it ends or is lost."""
        while (message := await self._messages.get()) is not None:
            yield message
        self._messages.put_nowait(None)  # for the next reader

    async def ask(self, directory: str | None, mark: str | None) -> HostFacts:
        """Facts of the host; see `cherry.remote.facts.collect_facts`.

        Raises:
            ConfigError: the agent does not start there.
            WorkerLostError: the host was lost meanwhile, or took too long.
        """
        found = await self._answer("facts", ask={"directory": directory, "mark": mark})
        self.asked_at = time.time()
        self.facts = HostFacts.model_validate(found)
        return self.facts

    async def listen(self) -> int:
        """A port on which the host accepts connections as long as the agent runs. Raises as `ask` does."""
        return int(await self._answer("listens", listen=True))

    async def unreachable(self, places: Sequence[Place]) -> list[str]:
        """Those of the places that the host cannot connect to, by their hosts' names. Raises as `ask` does."""
        return list(await self._answer("unreachable", connect=list(places)))

    async def fetch_data(self, uri: str, directory: str, environment: Mapping[str, str]) -> None:
        """Have prepared data copied to a directory of the host, unless it is there, however long that takes.

        Args:
            environment: variables with the credentials of the object store.

        Raises:
            CherryError: the host cannot read it or has no room, or those of `ask`.
        """
        order = {"data": uri, "directory": directory, "environment": dict(environment)}
        answer = await self._answer("fetched", timeout_s=None, fetch=order)
        if (error := error_of_record(answer["error"])) is not None:
            raise error_of_code(error.exit_code, f"{self.node.host}: its copy of the prepared data failed: {error}")

    async def open_files(self) -> asyncssh.SFTPClient:
        """The host's files, over this connection.

        Raises:
            ConfigError: its ssh server offers none.
            WorkerLostError: the host was lost.
        """
        try:
            return await self._connection.start_sftp_client()
        except (OSError, asyncssh.Error) as error:
            if getattr(error, "code", None) == asyncssh.OPEN_REQUEST_SESSION_FAILED:
                raise ConfigError(
                    f"{self.node.host}: its ssh server has no SFTP, by which metrics and logs are carried. Add "
                    "`Subsystem sftp internal-sftp` to its sshd_config, or put the run directory on a file system that "
                    "all hosts share and leave ssh.runs_directory out."
                ) from error
            raise WorkerLostError(f"{self.node.host}: its files cannot be reached: {error}") from error

    async def _answer(self, key: str, *, timeout_s: float | None = _ANSWER_S, **message: Any) -> Any:
        """What the agent answers under `key` to a message; `None` waits as long as the host is there."""
        self.send(**message)
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                async for heard in self.messages():
                    if key in heard:
                        return heard[key]
                if await self.is_lost():
                    raise WorkerLostError(f"{self.node.host}: the connection broke.")
                raise ConfigError(
                    f"{self.node.host}: this project's agent does not start there: {' '.join(self.errors)} Install "
                    "the project at the same path as here, or set ssh.python and ssh.directory in the cluster file."
                )
        raise WorkerLostError(f"{self.node.host}: its agent did not answer within {_ANSWER_S:.0f} s.")

    async def is_lost(self) -> bool:
        """Whether the messages ended because the host was lost, and not because its agent ended."""
        await self._process.wait()
        return self._process.exit_status is None

    async def close(self) -> None:
        """Close the connection, on which an agent that still runs ends its job."""
        for task in self._reading:
            task.cancel()
        self._connection.abort()
        with suppress(TimeoutError, OSError, asyncssh.Error):
            await asyncio.wait_for(self._connection.wait_closed(), 1.0)

    async def _read_messages(self) -> None:
        """Answer ticks at once, whatever else waits to be handled, and queue the other messages."""
        try:
            with suppress(OSError, asyncssh.Error):
                async for line in self._process.stdout:
                    for message in parse_lines(line):
                        self._take(message)
        finally:
            self._messages.put_nowait(None)

    def _take(self, message: dict[str, Any]) -> None:
        if "tick" not in message:
            self._messages.put_nowait(message)
            return
        self._tick = message["tick"]
        self._promised_until = time.monotonic() + LEASE_S
        self.send(tock=self._tick)

    async def _read_errors(self) -> None:
        with suppress(OSError, asyncssh.Error):
            async for line in self._process.stderr:
                self.errors.append(line.decode(errors="replace").strip())


async def open_session(node: NodeSpec, ssh: SshConfig) -> Session:
    """Agent on a host, newly started.

    Raises:
        ConfigError: the host's key is unknown or another one, or the host refuses the user.
        WorkerLostError: it does not answer.
    """
    connection = await _connect(node, ssh)
    try:
        process = await connection.create_process(agent_command(ssh), encoding=None)
    except (OSError, asyncssh.Error) as error:
        connection.abort()
        raise WorkerLostError(f"{node.host}: no program can be started there: {error}") from error
    return Session(node, connection, process)


def agent_command(ssh: SshConfig) -> str:
    """Command line that starts the agent on a host."""
    directory, python = ssh.directory or str(Path.cwd()), ssh.python or sys.executable
    # The interpreter finds site-packages by itself; in PYTHONPATH it would come before the standard library.
    is_checkout = ssh.python is None and Path(sysconfig.get_path("purelib")) != PACKAGES_FOLDER
    path = f"PYTHONPATH={shlex.quote(str(PACKAGES_FOLDER))} " if is_checkout else ""
    command = f"{shlex.quote(python)} -P -m cherry.remote.agent"
    return f"cd {shlex.quote(directory)} && exec env {path}{command}"


async def _connect(node: NodeSpec, ssh: SshConfig) -> asyncssh.SSHClientConnection:
    given: dict[str, Any] = {"username": ssh.user, "port": ssh.port}
    given |= {"client_keys": ssh.identity and [str(Path(ssh.identity).expanduser())]}
    given |= {"known_hosts": ssh.known_hosts and str(Path(ssh.known_hosts).expanduser())}
    own = Path("~/.ssh/config").expanduser()
    options = {
        "config": [str(own)] if own.exists() else None,
        **{key: value for key, value in given.items() if value is not None},
        "keepalive_interval": _KEEPALIVE_S,
        "keepalive_count_max": _KEEPALIVES,
        "login_timeout": _CONNECT_S,
    }
    try:
        async with asyncio.timeout(_CONNECT_S):
            resolved = await asyncssh.SSHClientConnectionOptions.construct(host=node.host, **options)
            if resolved.known_hosts is None:
                raise ConfigError(
                    f"{node.host}: ~/.ssh/config turns the check of host keys off (UserKnownHostsFile none). Set "
                    "ssh.known_hosts in the cluster file."
                )
            return await asyncssh.connect(node.host, **options)
    except (OSError, asyncssh.Error, ValueError) as error:  # TimeoutError is an OSError
        raise _refused(node, ssh, error) from error


def _bad_key(ssh: SshConfig, error: Exception) -> str:
    """Sentences on a private key that cannot be read."""
    if ssh.identity is None:
        return f"~/.ssh/config names an IdentityFile that cannot be read as a private key ({error}). Correct it there."
    path = Path(ssh.identity).expanduser()
    if "passphrase" in str(error).lower():
        return (
            f"ssh.identity: {path} has a passphrase, for which nobody is asked here. Add it to an agent (`ssh-add "
            f"{path}`) and leave ssh.identity out."
        )
    public = " Without .pub it is the private one." if path.suffix == ".pub" else ""
    return f"ssh.identity: {path} is not a private key ({error}). Name the file of one that the host knows.{public}"


def _refused(node: NodeSpec, ssh: SshConfig, error: Exception) -> CherryError:
    """The error of this project's family for a connection that failed."""
    host, known = node.host, ssh.known_hosts or "~/.ssh/known_hosts"
    scan, name = f"ssh-keyscan {host}", host
    if ssh.port is not None:
        scan, name = f"ssh-keyscan -p {ssh.port} {host}", f"'[{host}]:{ssh.port}'"
    if isinstance(error, asyncssh.HostKeyNotVerifiable):
        return ConfigError(
            f"{host}: its host key is not the one in {known}, or none is there, so this may be another machine. "
            f"Compare `{scan} | ssh-keygen -lf -` with what its owner gives you; then remove an old key by "
            f"`ssh-keygen -R {name} -f {known}`, and add this one by `{scan} >> {known}`."
        )
    if isinstance(error, asyncssh.PermissionDenied):
        return ConfigError(
            f"{host}: it refuses the user or the key ({error}). Try `ssh {host}`; set ssh.user and ssh.identity in the "
            "cluster file, or add the public key to ~/.ssh/authorized_keys there."
        )
    if isinstance(error, asyncssh.KeyImportError | asyncssh.KeyEncryptionError):
        return ConfigError(f"{host}: {_bad_key(ssh, error)}")
    for key, file in (("identity", ssh.identity), ("known_hosts", ssh.known_hosts)):
        if isinstance(error, OSError) and file is not None and error.filename == str(Path(file).expanduser()):
            return ConfigError(f"{host}: ssh.{key}: {error.filename} cannot be read: {error.strerror}.")
    if isinstance(error, socket.gaierror):
        return WorkerLostError(f"{host}: its name cannot be resolved. Check it in the cluster file.")
    if isinstance(error, ConnectionRefusedError):
        return WorkerLostError(f"{host}: it cannot be reached: no ssh server listens there ({error}).")
    if isinstance(error, ValueError | FileNotFoundError | IsADirectoryError | NotADirectoryError):
        return ConfigError(f"{host}: ssh cannot be set up: {error}. Check ssh in the cluster file, and ~/.ssh/config.")
    reason = f"no answer within {_CONNECT_S:.0f} s" if isinstance(error, TimeoutError) else str(error)
    return WorkerLostError(f"{host}: it cannot be reached: {reason or type(error).__name__}.")
