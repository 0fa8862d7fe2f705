"""Remote engine: another Anything server, reached over HTTP.

It always streams, so that a deadline on the first token and a cancelled generation reach the replica.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import httpx

from anything.keys import read_key_file
from anything.protocol import Chunk, EngineStatus, FinishReason, Generation, RefusedError, UnavailableError, Usage
from anything.sse import EventReader
from base.errors import ServiceError

# A replica on the same network accepts within milliseconds; a dead one must not consume the request's deadline.
_CONNECT_TIMEOUT_S = 2.0
# Idle connections to keep open to each replica.
_KEEPALIVE_CONNECTIONS = 256


class RemoteEngine:
    """Engine that forwards to the server at `url`, with the key in `api_key_file`."""

    def __init__(self, url: str, api_key_file: str, version: str) -> None:
        self.url = url.rstrip("/")
        self.version = version
        self._api_key_file = api_key_file
        self._http: httpx.AsyncClient | None = None

    async def start(self) -> None:
        """Read the key and open the connection pool.

        Raises:
            MissingFileError: no file at `api_key_file`.
        """
        headers = {"authorization": f"Bearer {read_key_file(self._api_key_file)}"}
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=_KEEPALIVE_CONNECTIONS)
        # No read timeout: the gateway's deadline cancels. No proxy: replicas are on this network.
        timeout = httpx.Timeout(None, connect=_CONNECT_TIMEOUT_S)
        self._http = httpx.AsyncClient(
            base_url=self.url, headers=headers, limits=limits, timeout=timeout, trust_env=False
        )

    async def generate(self, generation: Generation) -> AsyncIterator[Chunk]:
        """Chunks of the replica. Closing the iterator closes the connection, which cancels the replica's generation.

        Raises:
            RefusedError: the replica refused the request as a user error (4xx).
            UnavailableError: it failed, broke off, refused this gateway's key (502), or is overloaded or draining.
        """
        assert self._http is not None, "start() comes first"
        body = {"prompt": generation.prompt, "stream": True, **generation.sampling.as_body()}
        reader = EventReader()
        last: Chunk | None = None
        try:
            async with self._http.stream("POST", "/v1/anything/infer", json=body) as response:
                if response.status_code != httpx.codes.OK:
                    raise _refusal(self.url, response, await response.aread())
                async for line in response.aiter_lines():
                    event = reader.read(line)
                    if event is None:
                        continue
                    chunk = self._chunk(event)
                    if chunk.finish_reason is None:
                        yield chunk
                    else:
                        # Kept until the stream has ended, so that the connection can be used again.
                        last = chunk
        except httpx.HTTPError as error:
            raise _failed(f"the replica at {self.url} failed: {type(error).__name__}: {error}") from error
        if last is None or not reader.done:
            raise _failed(f"the replica at {self.url} broke off in the middle of an answer")
        yield last

    def _chunk(self, event: dict[str, Any]) -> Chunk:
        if "error" in event:
            error = event["error"]
            raise _failed(f"the replica at {self.url} failed: {error.get('message')}")
        reason: FinishReason | None = event.get("finish_reason")
        usage = Usage(**event["usage"]) if "usage" in event else None
        return Chunk(str(event["text"]), self.version, reason, usage)

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
        if self._http is not None:
            await self._http.aclose()
            self._http = None


def _failed(message: str) -> UnavailableError:
    return UnavailableError(message, status=502, code="replica_failed")


def _refusal(url: str, response: httpx.Response, body: bytes) -> ServiceError | RefusedError:
    """Error to send to the gateway's client for a replica's error response."""
    status = response.status_code
    try:
        answer = response.json()["error"]
        message, code = str(answer["message"]), str(answer["code"])
    except (ValueError, KeyError, TypeError):
        message, code = f"the replica at {url} answered {status}: {body[:200]!r}", "replica_failed"
    if status in (401, 403, 404):
        # The caller's own key was right: this gateway's is not, or there is another kind of server.
        return _failed(f"the replica at {url} does not take this gateway's requests ({status}): {message}")
    if status in (429, 503, 504):
        retry_after = response.headers.get("retry-after", "")
        return UnavailableError(
            message, status=status, code=code, retry_after_s=int(retry_after) if retry_after.isdigit() else None
        )
    if 400 <= status < 500:
        return RefusedError(message, status=status, code=code)
    return _failed(message)
