"""One admitted request: its body and its engine's chunks, until the deadline, a disconnect or a shutdown."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from starlette.requests import ClientDisconnect, Request

from anything.protocol import Chunk, Deadline, Engine, Generation, RefusedError, UnavailableError


class DisconnectedError(UnavailableError):
    """The client disconnected, so nobody reads this."""

    def __init__(self) -> None:
        # 499 is nginx's "client closed request".
        super().__init__("the client disconnected", status=499, code="disconnected")


class Call:
    """One request in flight. `interrupt` ends it at any point; `chunks` may be iterated once."""

    def __init__(self, deadline: Deadline) -> None:
        self._deadline = deadline
        self._stream: AsyncIterator[Chunk] | None = None
        self._interrupted: asyncio.Future[UnavailableError] = asyncio.get_running_loop().create_future()
        self._watcher: asyncio.Task[None] | None = None

    def interrupt(self, error: UnavailableError) -> None:
        """Make `next` raise `error`, immediately if it waits."""
        if not self._interrupted.done():
            self._interrupted.set_result(error)

    async def read_body(self, request: Request, limit_bytes: int) -> bytes:
        """Complete body of the request, bytes.

        Raises:
            RefusedError: it is longer than the limit (413), or incomplete at the deadline (408).
            UnavailableError: the client disconnected, or the error given to `interrupt`.
        """
        reading = asyncio.ensure_future(_read(request, limit_bytes))
        try:
            if await self._is_done_in_time(reading):
                return reading.result()
            text = f"the request's body did not arrive within {self._deadline.timeout_s:g} s"
            raise RefusedError(text, status=408, code="request_timeout")
        finally:
            await _settle(reading)

    def begin(self, engine: Engine, generation: Generation) -> None:
        """Start the generation whose chunks `next` returns."""
        self._stream = engine.generate(generation)

    def watch(self, request: Request) -> None:
        """Interrupt when the client disconnects. The request's body must have been read."""
        self._watcher = asyncio.create_task(self._watch(request))

    async def _watch(self, request: Request) -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        self.interrupt(DisconnectedError())

    async def _is_done_in_time(self, step: asyncio.Future[Any]) -> bool:
        """Whether `step` is done before the deadline; raises the error given to `interrupt` if that comes first."""
        waiting: set[asyncio.Future[Any]] = {step, self._interrupted}
        await asyncio.wait(waiting, timeout=self._deadline.remaining_s(), return_when=asyncio.FIRST_COMPLETED)
        if not step.done() and self._interrupted.done():
            raise self._interrupted.result()
        return step.done()

    async def next(self) -> Chunk:
        """Next chunk of the generation.

        Raises:
            UnavailableError: the deadline passed (504), or the error given to `interrupt`.
            RefusedError: the engine cannot take the request.
        """
        assert self._stream is not None
        step = asyncio.ensure_future(anext(self._stream))
        try:
            if await self._is_done_in_time(step):
                return step.result()
            self._deadline.expire()
            raise UnavailableError(
                f"the model gave no answer within {self._deadline.timeout_s:g} s, so the generation was cancelled. "
                "Ask for fewer tokens, or set stream to true.",
                status=504,
                code="timeout",
            )
        except StopAsyncIteration as error:
            raise UnavailableError(
                "the engine ended without a final chunk", status=502, code="engine_failed"
            ) from error
        finally:
            await _settle(step)

    async def chunks(self) -> AsyncIterator[Chunk]:
        """All chunks to the last one, within one deadline."""
        while True:
            chunk = await self.next()
            yield chunk
            if chunk.finish_reason is not None:
                return

    async def close(self) -> None:
        """Cancel the generation if it still runs, and stop watching for a disconnect."""
        if self._watcher is not None:
            await _settle(self._watcher)
        closing = getattr(self._stream, "aclose", None)
        if closing is not None:
            await closing()


async def _read(request: Request, limit_bytes: int) -> bytes:
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > limit_bytes:
        raise _too_large(int(declared), limit_bytes)
    received: list[bytes] = []
    size = 0
    try:
        async for data in request.stream():
            size += len(data)
            if size > limit_bytes:
                raise _too_large(size, limit_bytes)
            received.append(data)
    except ClientDisconnect as error:
        raise DisconnectedError from error
    return b"".join(received)


def _too_large(size: int, limit: int) -> RefusedError:
    text = f"the body has {size} bytes or more, the limit is {limit}. Send a shorter prompt."
    return RefusedError(text, status=413, code="too_large")


async def _settle(task: asyncio.Future[Any]) -> None:
    """Cancel a task unless it is done, and wait for its end; its result or error is discarded."""
    task.cancel()
    await asyncio.wait({task})
    if not task.cancelled():
        task.exception()
