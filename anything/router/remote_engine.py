"""Remote engine: another Anything server, reached over HTTP.

It always streams, so that a deadline on the first token and a cancelled generation reach the replica.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import httpx
from pydantic import BaseModel, StrictStr, ValidationError

from anything.connections import FRESH_ONLY, send_async
from anything.keys import read_key_file
from anything.protocol import (
    Chunk,
    EngineStatus,
    FinishReason,
    Generation,
    GenerationError,
    RefusedError,
    UnavailableError,
    Usage,
)
from anything.sse import EventReader
from base.errors import ServiceError

# A replica on the same network accepts within milliseconds; a dead one must not consume the request's deadline.
_CONNECT_TIMEOUT_S = 2.0
# Idle connections to keep open to each replica.
_KEEPALIVE_CONNECTIONS = 256


class _Event(BaseModel):
    """A piece of an answer. What else another server puts there is its own."""

    text: StrictStr
    finish_reason: FinishReason | None = None
    usage: Usage | None = None


class RemoteEngine:
    """Engine that forwards to the server at `url`, with the key in `api_key_file`."""

    def __init__(self, url: str, api_key_file: str, version: str) -> None:
        self.url = url.rstrip("/")
        self.version = version
        self._api_key_file = api_key_file
        self._http: httpx.AsyncClient | None = None
        self._fresh: httpx.AsyncClient | None = None

    async def start(self) -> None:
        """Read the key and open the connection pool.

        Raises:
            MissingFileError: no file at `api_key_file`.
        """
        headers = {"authorization": f"Bearer {read_key_file(self._api_key_file)}"}
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=_KEEPALIVE_CONNECTIONS)
        # No read timeout: the gateway's deadline cancels. No proxy: replicas are on this network.
        timeout = httpx.Timeout(None, connect=_CONNECT_TIMEOUT_S)
        self._http, self._fresh = (
            httpx.AsyncClient(base_url=self.url, headers=headers, limits=each, timeout=timeout, trust_env=False)
            for each in (limits, FRESH_ONLY)
        )

    async def generate(self, generation: Generation) -> AsyncIterator[Chunk]:
        """Chunks of the replica. Closing the iterator closes the connection, which cancels the replica's generation.

        Raises:
            RefusedError: the replica refused the request as a user error (4xx).
            GenerationError: the replica failed on this very request (500).
            UnavailableError: it was not reached, broke off, sent what is no answer of this API, or refused this
                gateway's key (502), or is overloaded or draining.
        """
        body = {"prompt": generation.prompt, "stream": True, **generation.sampling.as_body()}
        reader = EventReader()
        last: Chunk | None = None
        try:
            async with aclosing(await self._send(body)) as response:
                if response.status_code != httpx.codes.OK:
                    raise _refusal(self.url, response, await response.aread())
                async for received in response.aiter_bytes():
                    for event in reader.feed(received):
                        chunk = self._chunk(event)
                        if chunk.finish_reason is None:
                            yield chunk
                        else:
                            # Kept until the stream has ended, so that the connection can be used again.
                            last = chunk
        except httpx.HTTPError as error:
            raise _failed(f"the replica at {self.url} failed: {type(error).__name__}: {error}") from error
        except (RefusedError, UnavailableError):
            raise
        except ServiceError as error:
            raise _failed(f"the replica at {self.url} sent no answer of this API: {error}") from error
        if last is None or not reader.done:
            raise _failed(f"the replica at {self.url} broke off in the middle of an answer")
        yield last

    async def _send(self, body: dict[str, Any]) -> httpx.Response:
        assert self._http is not None and self._fresh is not None, "start() comes first"
        try:
            return await send_async(self._http, self._fresh, "POST", "/v1/anything/infer", body)
        except (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout) as error:
            text = f"the replica at {self.url} cannot be reached: {type(error).__name__}: {error}"
            raise UnavailableError(text, status=502, code="unreachable") from error

    def _chunk(self, event: dict[str, Any]) -> Chunk:
        if "error" in event:
            raise _reported(self.url, event["error"])
        try:
            content = _Event.model_validate(event)
        except ValidationError as error:
            wrong = ", ".join(".".join(map(str, item["loc"])) for item in error.errors(include_input=False))
            raise _failed(f"the replica at {self.url} sent an event with a missing or wrong field: {wrong}") from None
        return Chunk(content.text, self.version, content.finish_reason, content.usage)

    async def ready(self) -> bool:
        """Whether the replica answers /readyz with 200."""
        if self._http is None:
            return False
        try:
            response = await self._http.get("/readyz", timeout=_CONNECT_TIMEOUT_S)
        except httpx.HTTPError:
            return False
        return response.status_code == httpx.codes.OK

    async def status(self) -> EngineStatus:
        """Empty status: the replica serves its own /metrics."""
        return EngineStatus()

    async def close(self) -> None:
        """Close the connections."""
        for client in (self._http, self._fresh):
            if client is not None:
                await client.aclose()
        self._http = self._fresh = None


def _failed(message: str) -> UnavailableError:
    return UnavailableError(message, status=502, code="replica_failed")


def _reported(url: str, error: Any) -> UnavailableError:
    """Error for the one that a replica reported in the middle of a stream."""
    message = error.get("message") if isinstance(error, dict) else error
    if isinstance(error, dict) and error.get("code") == "generation_failed":
        return GenerationError(str(message))
    return _failed(f"the replica at {url} failed: {message}")


def _refusal(url: str, response: httpx.Response, body: bytes) -> ServiceError | RefusedError:
    """Error to send to the gateway's client for a replica's error response."""
    status = response.status_code
    try:
        answer = response.json()["error"]
        message, code = str(answer["message"]), str(answer["code"])
    except (ValueError, KeyError, TypeError, RecursionError):
        message = f"the replica at {url} answered {status}: {body[:200]!r}"
        # Without a server behind it, a proxy answers 503 in its own words.
        code = "replica_unavailable" if status == httpx.codes.SERVICE_UNAVAILABLE else "replica_failed"
    if status in (401, 403, 404, 405):
        # The caller's own key was right: this gateway's is not, or there is another kind of server.
        text = f"the replica at {url} does not take this gateway's requests ({status}): {message}"
        return UnavailableError(text, status=502, code="replica_refused")
    if status == httpx.codes.INTERNAL_SERVER_ERROR:
        return GenerationError(message, code=code)
    if status in (429, 503, 504):
        retry_after = response.headers.get("retry-after", "")
        return UnavailableError(
            message, status=status, code=code, retry_after_s=int(retry_after) if retry_after.isdigit() else None
        )
    if 400 <= status < 500:
        return RefusedError(message, status=status, code=code)
    return _failed(message)
