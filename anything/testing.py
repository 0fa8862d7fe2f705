"""Echo engine for tests: it repeats the prompt word by word, without a model.

Its controls may be used from any thread, so that a test can hold it at an exact token.
"""

from __future__ import annotations

import asyncio
import re
import threading
from collections.abc import AsyncIterator

from anything.protocol import Chunk, EngineStatus, FinishReason, Generation, UnavailableError, Usage


class EchoEngine:
    """Engine whose tokens are the prompt's words, each with the blanks after it; sampling changes nothing.

    Args:
        tokens: tokens to generate before the engine holds; `None` never holds. `let` allows more.
        limit: generations admitted at once; one more is refused with 429.
    """

    def __init__(self, version: str = "echo", *, tokens: int | None = None, limit: int = 1_000_000) -> None:
        self.version = version
        self.started = 0
        self.finished = 0
        self.cancelled = 0
        self._tokens = tokens
        self._limit = limit
        self._failure: UnavailableError | None = None
        self._changed = threading.Condition()
        self._waiters: set[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = set()

    def let(self, tokens: int | None) -> None:
        """Allow this many more tokens over all generations; `None` allows any number."""
        with self._changed:
            self._tokens = None if tokens is None else (self._tokens or 0) + tokens
            for loop, event in self._waiters:
                loop.call_soon_threadsafe(event.set)

    def fail(self, failure: UnavailableError | None) -> None:
        """Make generations fail before their next token; `None` repairs the engine."""
        with self._changed:
            self._failure = failure
            for loop, event in self._waiters:
                loop.call_soon_threadsafe(event.set)

    def wait_for(self, counter: str, count: int, timeout_s: float = 30.0) -> bool:
        """Block until `started`, `finished` or `cancelled` has reached `count`; False when it never did."""
        with self._changed:
            return self._changed.wait_for(lambda: bool(getattr(self, counter) >= count), timeout_s)

    async def start(self) -> None:
        """Do nothing: there is no model to load."""

    async def generate(self, generation: Generation) -> AsyncIterator[Chunk]:
        """Chunks of one word each; see the class.

        Raises:
            UnavailableError: what `fail` was given, or 429 when `limit` generations run.
        """
        if self.started - self.finished - self.cancelled >= self._limit:
            raise UnavailableError("the echo is busy", status=429, code="overloaded", retry_after_s=1)
        words: list[str] = re.findall(r"\S+\s*|\s+", generation.prompt)
        generated = words[: generation.sampling.max_tokens]
        reason: FinishReason = "length" if len(generated) < len(words) else "stop"
        self._count("started")
        ended = False
        try:
            for word in generated[:-1]:
                await self._permit()
                yield Chunk(word, self.version)
            await self._permit()
            self._count("finished")
            ended = True
            yield Chunk(generated[-1], self.version, reason, Usage(len(words), len(generated)))
        finally:
            if not ended:
                self._count("cancelled")

    async def _permit(self) -> None:
        """Wait until one more token is allowed."""
        event = asyncio.Event()
        waiter = (asyncio.get_running_loop(), event)
        while True:
            with self._changed:
                event.clear()
                if self._failure is not None:
                    raise self._failure
                if self._tokens is None:
                    return
                if self._tokens > 0:
                    self._tokens -= 1
                    return
                self._waiters.add(waiter)
            try:
                await event.wait()
            finally:
                with self._changed:
                    self._waiters.discard(waiter)

    def _count(self, counter: str) -> None:
        with self._changed:
            setattr(self, counter, getattr(self, counter) + 1)
            self._changed.notify_all()

    async def ready(self) -> bool:
        """Whether `fail` has not been called."""
        return self._failure is None

    async def status(self) -> EngineStatus:
        """Status with the number of running generations."""
        return EngineStatus({"running": self.started - self.finished - self.cancelled})

    async def close(self) -> None:
        """Do nothing: `start` allocated nothing."""
