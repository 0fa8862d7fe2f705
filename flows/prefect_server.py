"""Owns the Prefect server of a `cherry` command that has none to talk to: it idles beside training, and ends with it.

It knows nothing of flows. Prefect would start a server of its own (`SubprocessASGIServer`) once a flow runs: after
importing all of it in the flow's process too, to outlive a command that is killed, and with a worker that looks for
background work many times a second as long as it lives.
"""

from __future__ import annotations

import argparse
import asyncio
import atexit
import gc
import os
import signal
import socket
import subprocess
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager, suppress

from base.errors import OperationalError
from cherry.launcher import die_with_parent
from tasks.process import in_background
from tasks.programs import module_command, module_environment

_STOP_GRACE_S = 5.0
_WORKER_S = 10.0
# What Prefect tells its own temporary server.
_SERVER_VARIABLES = {"PREFECT_UI_ENABLED": "0", "PREFECT__SERVER_EPHEMERAL": "1", "PREFECT__SERVER_FINAL": "1"}


class TemporaryServer:
    """A server of this process, unless Prefect is told of another one; it starts while the caller imports Prefect."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._url = ""

    def start(self) -> None:
        """Begin to start; `answering` waits for it."""
        if os.environ.get("PREFECT_API_URL"):
            return
        with socket.create_server(("127.0.0.1", 0)) as listener:
            # Connections wait in the listener's queue from here on: there is no port to lose to another process.
            self._url = f"http://127.0.0.1:{listener.getsockname()[1]}/api"
            own = [f"--fd={listener.fileno()}", f"--parent={os.getpid()}"]
            self._process = subprocess.Popen(
                module_command("flows.prefect_server", own),
                env={**module_environment(), **_SERVER_VARIABLES},
                pass_fds=[listener.fileno()],
                start_new_session=True,  # Ctrl-C is for the flow, which tells its server how it ended
            )
        # Prefect has sent its last lines by then: it does so as threading shuts down, before what atexit calls.
        atexit.register(self._end)

    @property
    def starting(self) -> bool:
        """Whether there is something to wait for."""
        return self._process is not None

    @contextmanager
    def answering(self) -> Iterator[None]:
        """Prefect talks to this server inside, unless its settings name another one.

        Raises:
            OperationalError: its settings name none and forbid this one, or it ended, or it did not answer within
                PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS.
        """
        if not self.starting or _named():
            yield
            return
        from prefect.settings import PREFECT_API_URL, get_current_settings, temporary_settings

        settings = get_current_settings().server.ephemeral
        if not settings.enabled:
            raise _not_started("PREFECT_SERVER_ALLOW_EPHEMERAL_MODE forbids one")
        self._wait(settings.startup_timeout_seconds)
        with temporary_settings({PREFECT_API_URL: self._url}):
            yield

    def _wait(self, timeout_s: float) -> None:
        import httpx

        try:
            httpx.get(f"{self._url}/health", timeout=timeout_s, trust_env=False).raise_for_status()
        except httpx.HTTPError as error:
            code = None if self._process is None else self._process.poll()
            self._end()
            why = f"no answer in at most {timeout_s:g} s: {error}" if code is None else f"it ended with code {code}"
            raise _not_started(why) from error

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


def _named() -> bool:
    """Whether Prefect's settings, its profile's too, name a server."""
    from prefect.settings import get_current_settings

    return get_current_settings().api.url is not None


def _not_started(why: str) -> OperationalError:
    return OperationalError(
        f"Prefect's temporary server did not start ({why}). Try again when the machine is less busy, or start one "
        "(prefect server start) and set PREFECT_API_URL."
    )


def serve(listener: socket.socket) -> None:
    """Prefect's API on this listener until a signal ends it; it returns at once where another is named or none allowed.

    Its worker for background work leaves after a while: it has removed old events from the database by then, and the
    loops in which it looks for more take more of a core than everything else here.
    """
    from prefect.settings import get_current_settings

    if _named() or not get_current_settings().server.ephemeral.enabled:
        return
    import uvicorn
    from prefect.server.api import server

    whole = server.background_worker  # type: ignore[attr-defined]
    server.background_worker = lambda *given, **named: _for_a_while(whole(*given, **named))  # type: ignore[attr-defined]
    config = uvicorn.Config(server.create_app(), log_level="error", lifespan="on")
    gc.freeze()  # what is imported stays: looking through it for garbage takes a third of a second each time
    with in_background():
        uvicorn.Server(config).run(sockets=[listener])


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
    parser.add_argument("--fd", type=int, required=True, help="of the socket that it listens on")
    parser.add_argument("--parent", type=int, required=True, help="the pid of the process that it ends with")
    options = parser.parse_args(arguments)
    die_with_parent(signal.SIGTERM, options.parent)
    serve(socket.socket(fileno=options.fd))


if __name__ == "__main__":
    main()
