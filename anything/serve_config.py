"""Serving configuration; it needs no torch."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt

from base.config import Problem, Section
from base.sizes import Size

# Scheme, host and port, as a browser sends it: no path, not even a slash.
_ORIGIN = re.compile(r"https?://[^/\s]+")


class EngineConfig(Section):
    """Capacity of the embedded engine."""

    block_tokens: PositiveInt = 16
    """Tokens per block of the latent cache."""
    cache_blocks: PositiveInt = 1024
    max_running: PositiveInt = 16
    """Largest number of sequences in one decode batch."""
    prefill_chunk_tokens: PositiveInt = 256
    """Prompt tokens prefilled per engine step, beside the decoding sequences."""
    max_waiting: PositiveInt = 256
    """Requests queued before the gateway answers 429."""
    threads: PositiveInt | None = None
    """CPU threads per operation; `null` leaves it to torch (OMP_NUM_THREADS)."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` takes a GPU where there is one."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of weights, arithmetic and cache; `auto` is bfloat16 on a GPU and float32 on a CPU."""
    control_tokens_in_prompts: bool = False
    """Encode names of control tokens in prompts as those tokens, for callers that apply a chat template themselves. By
    default they are plain text, as in training documents, so that a user's text cannot end or pose as a turn."""


class ServeConfig(Section):
    """HTTP server in front of one engine, or of several replicas."""

    host: str = "127.0.0.1"
    port: int = Field(default=8080, ge=0, le=65535)
    """0 picks a free port."""
    timeout_s: PositiveFloat = 30.0
    shutdown_timeout_s: PositiveFloat = 10.0
    max_tokens_without_stream: PositiveInt = 2048
    max_request_bytes: Size = 1_000_000
    cors_origins: tuple[str, ...] = ()
    """Origins of web pages that may ask from a browser, like https://example.com; `*` is any. None by default."""
    engine: EngineConfig = EngineConfig()

    def problems(self) -> Iterator[Problem]:
        """Rules over several keys."""
        if self.engine.prefill_chunk_tokens < self.engine.block_tokens:
            rule = f"must be at least block_tokens ({self.engine.block_tokens})"
            yield Problem("engine.prefill_chunk_tokens", rule, self.engine.prefill_chunk_tokens)
        for number, origin in enumerate(self.cors_origins):
            if origin != "*" and not _ORIGIN.fullmatch(origin):
                yield Problem(f"cors_origins.{number}", "must be * or an origin like https://example.com:8443", origin)
