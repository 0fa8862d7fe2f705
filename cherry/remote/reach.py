"""Whether hosts reach each other: each listens on a port, and connects to the others'."""

from __future__ import annotations

import socket
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import TypedDict

# A SYN that is lost is sent again after one second, and after two more (RFC 6298).
_CONNECT_S = 5.0
_AT_ONCE = 64


class Place(TypedDict):
    """Where a host listens."""

    host: str
    address: str
    port: int


def listen() -> int:
    """A port on which this process accepts connections, and closes them, to its end."""
    server = socket.create_server(("", 0), backlog=128)

    def accept() -> None:
        while True:
            with suppress(OSError):
                server.accept()[0].close()

    threading.Thread(target=accept, name="listener", daemon=True).start()
    return int(server.getsockname()[1])


def unreachable(places: Sequence[Place]) -> list[str]:
    """Hosts to which no connection can be made from here within some seconds."""
    if not places:
        return []
    with ThreadPoolExecutor(min(_AT_ONCE, len(places))) as pool:
        reached = list(pool.map(_reaches, places))
    return [place["host"] for place, reaches in zip(places, reached, strict=True) if not reaches]


def _reaches(place: Place) -> bool:
    try:
        socket.create_connection((place["address"], place["port"]), timeout=_CONNECT_S).close()
    except OSError:
        return False
    return True
