"""TCP ports of this machine: a free one, and whether a server can listen on a given one."""

from __future__ import annotations

import errno
import socket

import psutil

from base.errors import ConfigError, PortInUseError

_HIGHEST = 65535


def free_port() -> int:
    """A port of the loopback address that nobody listened on just now."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def check_port(host: str, port: int) -> None:
    """Check that a server can listen there, by listening there for a moment. Port 0 is any free one.

    Raises:
        PortInUseError: another process listens there; the text names it and a port that is free.
        ConfigError: this machine has no such address, or the port needs privileges.
    """
    try:
        _listen(host, port)
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise ConfigError(
                f"serve.host and serve.port: a server cannot listen on {host}:{port} ({error.strerror or error})"
            ) from error
        raise port_in_use(host, port) from error


def port_in_use(host: str, port: int) -> PortInUseError:
    """The error of a gateway whose port is taken."""
    free = next((one for one in range(port + 1, _HIGHEST + 1) if _is_free(host, one)), 0)
    return PortInUseError(
        f"serve.port: port {port} on {host} is in use by another process{_listener(port)}. Stop it, or serve on "
        f"another port: serve.port={free} (0 takes any free one)."
    )


def _listen(host: str, port: int) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    socket.create_server((host, port), family=family).close()


def _is_free(host: str, port: int) -> bool:
    try:
        _listen(host, port)
    except OSError:
        return False
    return True


def _listener(port: int) -> str:
    """The process that listens on a port, in brackets, as far as this user may know; else empty."""
    try:
        found = next(
            one.pid
            for one in psutil.net_connections("tcp")
            if one.status == psutil.CONN_LISTEN and one.laddr and one.laddr.port == port and one.pid is not None
        )
        return f" ({psutil.Process(found).name()}, pid {found})"
    except (StopIteration, psutil.Error):
        return ""
