"""What a remote engine sends to its replica."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from anything.protocol import Chunk, Generation, SamplingParams
from anything.router.remote_engine import RemoteEngine
from anything.testing import EchoEngine


class Listening(EchoEngine):
    """Keeps the sampling fields that reached it."""

    async def generate(self, generation: Generation) -> AsyncIterator[Chunk]:
        self.sampling = generation.sampling
        async for chunk in super().generate(generation):
            yield chunk


@pytest.mark.parametrize(
    "sampling", [SamplingParams(), SamplingParams(max_tokens=7, temperature=0.25, seed=2**63 - 1)], ids=["none", "all"]
)
def test_every_sampling_field_reaches_the_replica(
    sampling: SamplingParams, serve: Callable[..., str], key_file: tuple[str, str], tmp_path: Path
) -> None:
    replica = Listening()
    key = tmp_path / "key"
    key.write_text(key_file[1])
    engine = RemoteEngine(serve(replica), str(key), "v")

    async def ask() -> None:
        await engine.start()
        assert [chunk.text async for chunk in engine.generate(Generation("one two", sampling))] == ["one ", "two"]
        await engine.close()

    asyncio.run(ask())
    assert replica.sampling == sampling
    if sampling != SamplingParams():
        assert all(getattr(sampling, name) != getattr(SamplingParams(), name) for name in SamplingParams.model_fields)
