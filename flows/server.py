"""Owns the Prefect server of a `cherry` command that has none to talk to: it idles beside training, and ends with it.

It knows nothing of flows. Prefect would start a server of its own (`SubprocessASGIServer`) once a flow runs: after
importing all of it in the flow's process too, to outlive a command that is killed, and with a worker that looks for
background work many times a second.
"""

from __future__ import annotations

import argparse
import atexit
import gc
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager

from cherry.launcher import die_with_parent
from tasks.process import in_background

_STOP_GRACE_S = 5.0
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
                [sys.executable, "-m", "flows.server", *own],
                env={**os.environ, **_SERVER_VARIABLES},
                pass_fds=[listener.fileno()],
                start_new_session=True,  # Ctrl-C is for the flow, which tells its server how it ended
            )
        # Before Prefect's own, which send the last log lines: they run in the opposite order.
        atexit.register(self._end)

    @property
    def starting(self) -> bool:
        """Whether there is something to wait for."""
        return self._process is not None

    @contextmanager
    def answering(self) -> Iterator[None]:
        """Prefect talks to this server inside, unless its settings name another one.

        Raises:
            RuntimeError: its settings name none and forbid this one, or it ended, or it did not answer within
                PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS.
        """
        if not self.starting or _named():
            yield
            return
        from prefect.settings import PREFECT_API_URL, get_current_settings, temporary_settings

        settings = get_current_settings().server.ephemeral
        if not settings.enabled:
            raise RuntimeError("PREFECT_SERVER_ALLOW_EPHEMERAL_MODE forbids one")
        self._wait(settings.startup_timeout_seconds)
        with temporary_settings({PREFECT_API_URL: self._url}):
            yield

    def _wait(self, timeout_s: float) -> None:
        import httpx

        try:
            httpx.get(f"{self._url}/health", timeout=timeout_s, trust_env=False).raise_for_status()
        except httpx.HTTPError as error:
            self._end()
            late = isinstance(error, httpx.TimeoutException)
            raise RuntimeError(f"no answer within {timeout_s:g} s" if late else f"it ended: {error}") from error

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


def serve(listener: socket.socket) -> None:
    """Prefect's API on this listener until a signal ends it; it returns at once where another server is named."""
    if _named():
        return
    import uvicorn
    from prefect.server.api import server

    # Deletions of logs, clean-up after cancellations and such: a temporary server is gone before they matter, and
    # the loops that look for them take more of a core than everything else in it.
    server.background_worker = _no_worker  # type: ignore[attr-defined]
    config = uvicorn.Config(server.create_app(), log_level="error", lifespan="on")
    gc.freeze()  # what is imported stays: looking through it for garbage takes a third of a second each time
    with in_background():
        uvicorn.Server(config).run(sockets=[listener])


@asynccontextmanager
async def _no_worker(*_: object, **__: object) -> AsyncIterator[None]:
    yield


def main(arguments: Sequence[str] | None = None) -> None:
    """The server's process."""
    parser = argparse.ArgumentParser(prog="python -m flows.server", description="A temporary Prefect server.")
    parser.add_argument("--fd", type=int, required=True, help="of the socket that it listens on")
    parser.add_argument("--parent", type=int, required=True, help="the pid of the process that it ends with")
    options = parser.parse_args(arguments)
    die_with_parent(signal.SIGTERM, options.parent)
    serve(socket.socket(fileno=options.fd))


if __name__ == "__main__":
    main()
