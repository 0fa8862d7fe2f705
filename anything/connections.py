"""A request over a kept connection, sent once more over a fresh one when the server had closed it in the meantime.

A server ends idle connections at a time of its own, which may be the moment at which the next request is sent. Every
request of this API may be repeated: it changes nothing on the server.
"""

from __future__ import annotations

from typing import Any

import httpx

# What a closed connection looks like before the first byte of an answer.
_CLOSED = (httpx.ReadError, httpx.WriteError, httpx.RemoteProtocolError)
_CONNECTING = "connection.connect_tcp.started"
FRESH_ONLY = httpx.Limits(max_keepalive_connections=0)
"""Limits of the client for the second attempt: it never uses a connection twice."""


def send(
    kept: httpx.Client, fresh: httpx.Client, method: str, path: str, body: dict[str, Any] | None
) -> httpx.Response:
    """Response whose body is still to be read; the caller closes it.

    A request that was the first on its connection is not repeated: it may have broken the server itself.

    Raises:
        httpx.HTTPError: of the first attempt, also when the second one failed as well.
    """
    seen: set[str] = set()
    trace = {"trace": lambda name, _: seen.add(name)}
    try:
        return kept.send(kept.build_request(method, path, json=body, extensions=trace), stream=True)
    except _CLOSED:
        if _CONNECTING in seen:
            raise
        try:
            return fresh.send(fresh.build_request(method, path, json=body), stream=True)
        except httpx.TransportError:
            pass
        raise


async def send_async(
    kept: httpx.AsyncClient, fresh: httpx.AsyncClient, method: str, path: str, body: dict[str, Any] | None
) -> httpx.Response:
    """Response as of `send`, asynchronously."""
    seen: set[str] = set()

    async def trace(name: str, _: object) -> None:
        seen.add(name)

    try:
        return await kept.send(kept.build_request(method, path, json=body, extensions={"trace": trace}), stream=True)
    except _CLOSED:
        if _CONNECTING in seen:
            raise
        try:
            return await fresh.send(fresh.build_request(method, path, json=body), stream=True)
        except httpx.TransportError:
            pass
        raise
