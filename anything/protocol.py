"""Engine protocol: a generation with its sampling fields, its chunks, its deadline, and how it is refused.

An engine may live in this process or behind another server, so there is neither torch nor HTTP here.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field, model_validator

from base.errors import RequestError, ServiceError

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

FinishReason = Literal["stop", "length"]
# Some twenty lines of text: an answer that a default timeout leaves time for.
DEFAULT_MAX_TOKENS = 256
# Codes of errors that say nothing about the request: the server was not reached or refused it before any work, or ends
# for a reason of its own. Any other failure may have been the request's doing, and would be again elsewhere.
_CODES_WORTH_ANOTHER_REPLICA = frozenset(
    {"draining", "engine_down", "engine_ended", "loading", "replica_refused", "replica_unavailable", "unreachable"}
)
# What torch.Generator.manual_seed and a signed 64-bit integer of other engines both take.
_MAX_SEED = 2**63 - 1


class RefusedError(RequestError):
    """A user error, with its HTTP status."""

    def __init__(self, message: str, *, status: int = 422, code: str = "invalid_request") -> None:
        super().__init__(message)
        self.status = status
        self.code = code


class UnavailableError(ServiceError):
    """A transient error: the service failed or is overloaded; the same request may succeed later."""

    def __init__(self, message: str, *, status: int, code: str, retry_after_s: int | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.retry_after_s = retry_after_s

    @property
    def worth_another_replica(self) -> bool:
        """Whether another replica may be asked: what failed did not come from the request."""
        return self.code in _CODES_WORTH_ANOTHER_REPLICA


class GenerationError(UnavailableError):
    """The engine failed on this request (HTTP 500): its logits are not finite, or a step raised.

    It would fail elsewhere as well, so no other replica is asked.
    """

    def __init__(self, message: str, *, code: str = "generation_failed") -> None:
        super().__init__(message, status=500, code=code)


class Deadline:
    """Time that is left for a whole answer, or for the next chunk of a stream."""

    def __init__(self, timeout_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.timeout_s = timeout_s
        self.expired = False
        self._clock = clock
        self._end = clock() + timeout_s

    def remaining_s(self) -> float:
        """Seconds until the deadline, never negative."""
        return max(0.0, self._end - self._clock())

    def restart(self) -> None:
        """Restart the timer, for the next chunk of a stream."""
        self._end = self._clock() + self.timeout_s

    def expire(self) -> None:
        """Record that the gateway gave up, so that the engine it cancels next knows why."""
        self.expired = True


class SamplingParams(BaseModel):
    """Sampling fields of a request: the one list that clients, the HTTP API and engines share."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, hide_input_in_errors=True)

    max_tokens: Annotated[int, Field(ge=1)] = DEFAULT_MAX_TOKENS
    """Largest number of tokens to generate."""
    temperature: Annotated[float, Field(ge=0.0, le=2.0, allow_inf_nan=False)] = 0.0
    """0 is greedy."""
    seed: Annotated[int, Field(ge=0, le=_MAX_SEED)] | None = None
    """Seed of the sampling; `None` draws one."""

    @model_validator(mode="before")
    @classmethod
    def _null_is_the_default(cls, fields: Any) -> Any:
        """Fields without those that are null: clients send null for what they leave to the server."""
        if not isinstance(fields, dict):
            return fields
        return {name: value for name, value in fields.items() if value is not None or name not in cls.model_fields}

    def as_body(self) -> dict[str, Any]:
        """Fields of a request body; those that are `None` are left to the server."""
        return self.model_dump(exclude_none=True)


@dataclass(frozen=True)
class Generation:
    """One request for text."""

    prompt: str = field(repr=False)
    sampling: SamplingParams
    subject: str = ""
    """Key of sticky routing: requests of one subject go to one replica."""
    deadline: Deadline | None = None


@dataclass(frozen=True)
class Usage:
    """Token counts of a finished generation."""

    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True)
class Chunk:
    """A piece of the output, in whole characters. The last one has the finish reason and the usage."""

    text: str
    version: str
    """Label of the model version that generated it."""
    finish_reason: FinishReason | None = None
    usage: Usage | None = None


@dataclass(frozen=True)
class EngineStatus:
    """Figures of an engine for /metrics and /v1/anything/routes."""

    gauges: Mapping[str, float] = field(default_factory=dict)
    """Current values by metric name, without the prefix `anything_`."""
    registry: CollectorRegistry | None = None
    """Further metrics of the engine's own."""
    routes: Mapping[str, Any] | None = None
    """Routes in force and figures of each version, as JSON; `None` for an engine that does not route."""
    versions: tuple[str, ...] = ()
    """Labels of the model versions that answer now."""
    failure: str | None = None
    """Why the engine will serve no request again, as a sentence; `None` while it may."""


class Engine(Protocol):
    """An engine that generates text for the gateway.

    `generate` yields at least one chunk, ends after the one with a finish reason, and cancels its generation when
    its iterator is closed or its waiting task is cancelled.
    It raises `RefusedError` or `UnavailableError`, and `GenerationError` when it failed on this very request: no other
    generation is harmed by that.
    """

    async def start(self) -> None:
        """Load the model or connect to it; return once `generate` may be called."""

    def generate(self, generation: Generation) -> AsyncIterator[Chunk]:
        """Chunks of one generation."""

    async def ready(self) -> bool:
        """Whether a generation would be admitted now."""

    async def status(self) -> EngineStatus:
        """Figures of the engine now."""

    async def close(self) -> None:
        """Cancel every generation and free what `start` allocated."""
