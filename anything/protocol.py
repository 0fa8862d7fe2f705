"""Owns what the gateway and an engine say to each other: a generation, its chunks, its deadline, and refusals.

It knows neither HTTP nor torch: an engine may live in this process or behind another server.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

from base.errors import RequestError, ServiceError

FinishReason = Literal["stop", "length"]


class RefusedError(RequestError):
    """The caller's fault, with the HTTP status that says which."""

    def __init__(self, message: str, *, status: int = 422, code: str = "invalid_request") -> None:
        super().__init__(message)
        self.status = status
        self.code = code


class UnavailableError(ServiceError):
    """The service's fault, or its load; the same request may succeed later."""

    def __init__(self, message: str, *, status: int, code: str, retry_after_s: int | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.retry_after_s = retry_after_s


class Deadline:
    """The time that is left for the next thing a caller waits for: the whole answer, or each gap of a stream."""

    def __init__(self, timeout_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.timeout_s = timeout_s
        self.expired = False
        self._clock = clock
        self._end = clock() + timeout_s

    def remaining_s(self) -> float:
        """Seconds until the deadline, never negative."""
        return max(0.0, self._end - self._clock())

    def restart(self) -> None:
        """Give the next gap of a stream the whole time again."""
        self._end = self._clock() + self.timeout_s

    def expire(self) -> None:
        """Record that the gateway gave up, so that an engine that is cancelled next knows why."""
        self.expired = True


@dataclass(frozen=True)
class Generation:
    """One request for text."""

    prompt: str = field(repr=False)
    max_tokens: int
    temperature: float = 0.0
    """0 is greedy."""
    seed: int | None = None
    """Of the sampling; `None` draws one."""
    subject: str = ""
    """Whom a sticky route is kept for."""
    deadline: Deadline | None = None


@dataclass(frozen=True)
class Usage:
    """Tokens that a generation took in and gave out."""

    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True)
class Chunk:
    """A piece of the output, whole characters only. The last one carries why generation ended, and the usage."""

    text: str
    version: str
    """The model version that wrote it."""
    finish_reason: FinishReason | None = None
    usage: Usage | None = None


class Engine(Protocol):
    """What the gateway needs from whatever generates text.

    `generate` yields at least one chunk, ends after the one with a finish reason, and cancels its generation when
    its iterator is closed or its waiting task is cancelled.
    It raises `RefusedError` or `UnavailableError`.
    """

    async def start(self) -> None:
        """Load what is needed; return once `generate` may be called."""

    def generate(self, generation: Generation) -> AsyncIterator[Chunk]:
        """The chunks of one generation."""

    async def ready(self) -> bool:
        """Whether a generation would be taken in now."""

    def gauges(self) -> Mapping[str, float]:
        """Numbers for /metrics, by name."""

    async def close(self) -> None:
        """Cancel every generation and give back what `start` took."""
