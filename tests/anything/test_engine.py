"""The engine says what greedy decoding without a cache says, whatever else runs beside it."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager

import pytest
import torch

from anything.config import EngineConfig
from anything.engine import EmbeddedEngine
from anything.protocol import Chunk, Generation, RefusedError, UnavailableError
from anything.tokenizer import Tokenizer
from base.errors import MissingFileError, WeightsError
from model.transformer import DeepseekV3
from model.weights import load_pretrained

PROMPTS = ["a", "def main(", "x" * 37, "".join(map(chr, range(40, 120))), "été " * 9, "0123456789" * 11]


@torch.inference_mode()
def greedy_without_cache(model: DeepseekV3, prompt: list[int], max_tokens: int) -> tuple[list[int], str]:
    tokens = list(prompt)
    for _ in range(max_tokens):
        hidden = model(torch.tensor([tokens])).hidden_BTD
        token = int(model.logits(hidden[0, -1]).argmax())
        if token == model.config.eos_token_id:
            return tokens[len(prompt) :], "stop"
        tokens.append(token)
    return tokens[len(prompt) :], "length"


@asynccontextmanager
async def running(uri: str, config: EngineConfig) -> AsyncIterator[EmbeddedEngine]:
    engine = EmbeddedEngine(uri, config, version="v")
    await engine.start()
    try:
        yield engine
    finally:
        await engine.close()


async def collect(engine: EmbeddedEngine, generation: Generation) -> list[Chunk]:
    return [chunk async for chunk in engine.generate(generation)]


@pytest.mark.parametrize("kind", ["float32", "int8"])
@pytest.mark.parametrize(
    "config",
    [
        EngineConfig(block_tokens=16, cache_blocks=256),
        # Prompts in several chunks, few places, blocks for about two sequences: preemption and reuse.
        EngineConfig(block_tokens=4, cache_blocks=52, max_running=4, prefill_chunk_tokens=7),
    ],
    ids=["roomy", "tight"],
)
def test_concurrent_greedy_equals_decoding_without_a_cache(
    kind: str, config: EngineConfig, model_folder: str, int8_folder: str
) -> None:
    uri = model_folder if kind == "float32" else int8_folder
    model = load_pretrained(uri, dtype=torch.float32)
    tokenizer = Tokenizer(uri)
    asked = [(prompt, 5 + 9 * index) for index, prompt in enumerate(PROMPTS)]
    expected = [greedy_without_cache(model, tokenizer.encode(prompt), count) for prompt, count in asked]
    assert len({tuple(tokens) for tokens, _ in expected}) == len(PROMPTS)

    async def main() -> tuple[list[list[Chunk]], dict[str, float]]:
        async with running(uri, config) as engine:
            answers = await asyncio.gather(*(collect(engine, Generation(p, n)) for p, n in asked))
            return list(answers), dict(engine.gauges())

    answers, gauges = asyncio.run(main())
    for (prompt, _), (tokens, reason), chunks in zip(asked, expected, answers, strict=True):
        assert "".join(chunk.text for chunk in chunks) == tokenizer.decode(tokens)
        assert chunks[-1].finish_reason == reason
        usage = chunks[-1].usage
        assert usage is not None
        assert (usage.prompt_tokens, usage.completion_tokens) == (len(tokenizer.encode(prompt)), len(tokens))
        assert all(chunk.finish_reason is None for chunk in chunks[:-1])
    assert gauges["cache_blocks_free"] == config.cache_blocks
    assert (gauges["preemptions"] > 0) == (config.cache_blocks == 52)
