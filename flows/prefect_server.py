"""A temporary Prefect server for a `cherry` command without one; it uses little CPU and ends with the command.

Prefect's own (`SubprocessASGIServer`) starts later, is imported into the flow's process too, survives a command that is
killed, and polls for background work for as long as it lives. docs/decisions.md has the figures.
"""

from __future__ import annotations

import argparse
import asyncio
import atexit
import gc
import os
import re
import signal
import socket
import subprocess
import tempfile
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager, suppress
from typing import IO
from urllib.parse import urlsplit

from base.errors import ConfigError, OperationalError, without_credentials
from cherry.launcher import die_with_parent
from tasks.files.file_lock import hold_lock
from tasks.processes.process import in_background
from tasks.processes.programs import module_command, module_environment

URL_VARIABLE = "PREFECT_API_URL"
"""Environment variable with the address of Prefect's server."""
_STOP_GRACE_S = 5.0
_WORKER_S = 10.0
_DATABASE_VARIABLES = ("PREFECT_API_DATABASE_CONNECTION_URL", "PREFECT_SERVER_DATABASE_CONNECTION_URL")
# "sqlalchemy.exc.OperationalError: (sqlite3.OperationalError) unable to open database file"
_ERROR_LINE = re.compile(r"[A-Za-z_][\w.]*(Error|Exception|Refused\w*|Exit)\b.*:")
# Variables that Prefect sets for its own temporary server.
_SERVER_VARIABLES = {"PREFECT_UI_ENABLED": "0", "PREFECT__SERVER_EPHEMERAL": "1", "PREFECT__SERVER_FINAL": "1"}


class TemporaryServer:
    """A Prefect server that belongs to this process; none is started when PREFECT_API_URL names one."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._url = ""
        self._output: IO[bytes] | None = None

    def start(self) -> None:
        """Start the server in the background; `answering` waits for it.

        Raises:
            ConfigError: PREFECT_API_URL is no server's address.
        """
        if named := os.environ.get(URL_VARIABLE):
            check_address(named)
            return
        with socket.create_server(("127.0.0.1", 0)) as listener:
            # Connections wait in the listener's queue from here on: there is no port to lose to another process.
            self._url = f"http://127.0.0.1:{listener.getsockname()[1]}/api"
            self._output = tempfile.TemporaryFile(prefix="cherry-prefect-")  # noqa: SIM115 - as long as the server
            own = [f"--fd={listener.fileno()}", f"--parent={os.getpid()}"]
            self._process = subprocess.Popen(
                module_command("flows.prefect_server", own),
                env={**module_environment(), **_SERVER_VARIABLES},
                pass_fds=[listener.fileno()],
                stdout=self._output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is for the flow, which tells its server how it ended
            )
        # Prefect has sent its last lines by then: it does so as threading shuts down, before what atexit calls.
        atexit.register(self._end)

    @property
    def starting(self) -> bool:
        """Whether a server was started."""
        return self._process is not None

    @contextmanager
    def answering(self) -> Iterator[None]:
        """Wait for the server, and point Prefect at it inside the context, unless Prefect's settings name another one.

        Raises:
            ConfigError: what they name is no server's address.
            OperationalError: its settings name none and forbid this one, or it ended, or it did not answer within
                PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS.
        """
        if named := _named():
            check_address(named)
        if not self.starting or named:
            yield
            return
        from prefect.settings import (
            PREFECT_API_AUTH_STRING,
            PREFECT_API_URL,
            PREFECT_SERVER_API_AUTH_STRING,
            get_current_settings,
            temporary_settings,
        )

        settings = get_current_settings().server.ephemeral
        if not settings.enabled:
            raise _not_started("PREFECT_SERVER_ALLOW_EPHEMERAL_MODE forbids one", "Allow it")
        self._wait(settings.startup_timeout_seconds)
        # A server takes its password from the environment, so this one has one too where others are protected.
        password = PREFECT_SERVER_API_AUTH_STRING.value()
        with temporary_settings({PREFECT_API_URL: self._url, PREFECT_API_AUTH_STRING: password}):
            yield

    def _wait(self, timeout_s: float) -> None:
        import httpx

        try:
            httpx.get(f"{self._url}/health", timeout=timeout_s, trust_env=False).raise_for_status()
        except httpx.TimeoutException as error:
            self._end()
            raise _not_started(f"no answer in {timeout_s:g} s", "Try again when the machine is less busy") from error
        except httpx.HTTPError as error:
            code = self._exit_code()
            self._end()
            why = str(error) if code is None else f"it ended with code {code}: {self._said()}"
            raise _not_started(why, _where_it_writes()) from error

    def _said(self) -> str:
        """The error that the server ended with, from its output: the last line of a traceback."""
        if self._output is None:
            return "it printed nothing"
        self._output.seek(0)
        lines = self._output.read().decode(errors="replace").splitlines()
        errors = [line for line in lines if _ERROR_LINE.match(line)]
        return without_credentials((errors or lines or ["it printed nothing"])[-1].strip())

    def _exit_code(self) -> int | None:
        """The server's exit code; its connections are closed some time before it has ended."""
        if self._process is None:
            return None
        with suppress(subprocess.TimeoutExpired):
            return self._process.wait(_STOP_GRACE_S)
        return None

    def _end(self) -> None:
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(_STOP_GRACE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None


def check_address(url: str) -> None:
    """Check that PREFECT_API_URL, of the environment or of Prefect's profile, may be a server's address.

    Raises:
        ConfigError: it never is.
    """
    try:
        parts = urlsplit(url)
        is_address = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is none, half an IPv6 address
        is_address = False
    if not is_address or any(one.isspace() for one in url):
        raise ConfigError(
            f"{URL_VARIABLE}: must be the address of Prefect's server, like http://127.0.0.1:4200/api (got "
            f"{without_credentials(url)!r}). Correct it, or unset it."
        )


def _named() -> str | None:
    """Address of the server that Prefect's settings, including its profile, name; `None` without one."""
    from prefect.settings import get_current_settings

    return get_current_settings().api.url


def _where_it_writes() -> str:
    """Advice for a server without a usable database: the setting that names it."""
    from prefect.settings import get_current_settings

    for name in filter(os.environ.get, _DATABASE_VARIABLES):
        return f"{name} must name a database that answers; without it, a file in PREFECT_HOME is used"
    return f"PREFECT_HOME ({get_current_settings().home}) must be a directory that can be written"


def _not_started(why: str, advice: str) -> OperationalError:
    return OperationalError(
        f"Prefect's temporary server did not start ({why}). {advice}, or start a server (prefect --no-prompt server "
        "start) and set PREFECT_API_URL."
    )


def serve(listener: socket.socket) -> None:
    """Serve Prefect's API on `listener` until a signal; returns at once if another server is named or none is allowed.

    The background worker is stopped after some seconds: it has removed old events from the database by then, and its
    polling takes more CPU than everything else here.
    """
    from prefect.settings import get_current_settings

    if _named() or not get_current_settings().server.ephemeral.enabled:
        return
    import uvicorn
    from prefect.server.api import server

    class _Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            """Start; servers that start at once on a new database would migrate it together, which fails."""
            home = get_current_settings().home
            home.mkdir(parents=True, exist_ok=True)
            with hold_lock(home / "cherry-migration.lock"):
                await super().startup(sockets)

    original = server.background_worker  # type: ignore[attr-defined]
    server.background_worker = lambda *args, **kwargs: _for_a_while(original(*args, **kwargs))  # type: ignore[attr-defined]
    config = uvicorn.Config(server.create_app(), log_level="error", lifespan="on")
    gc.freeze()  # a garbage collection over all that is imported takes a third of a second
    with in_background():
        _Server(config).run(sockets=[listener])


@asynccontextmanager
async def _for_a_while(worker: AbstractAsyncContextManager[None]) -> AsyncIterator[None]:
    async def work() -> None:
        async with worker:
            await asyncio.sleep(_WORKER_S)

    working = asyncio.create_task(work())
    try:
        yield
    finally:
        working.cancel()
        with suppress(asyncio.CancelledError):
            await working


def main(arguments: Sequence[str] | None = None) -> None:
    """The server's process."""
    parser = argparse.ArgumentParser(prog="python -m flows.prefect_server", description="A temporary Prefect server.")
    parser.add_argument("--fd", type=int, required=True, help="file descriptor of the listening socket")
    parser.add_argument("--parent", type=int, required=True, help="pid of the process that it ends with")
    options = parser.parse_args(arguments)
    die_with_parent(signal.SIGTERM, options.parent)
    serve(socket.socket(fileno=options.fd))


if __name__ == "__main__":
    main()
