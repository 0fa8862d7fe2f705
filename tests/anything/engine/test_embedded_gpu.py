"""The engine on a GPU: the same greedy text as without a cache in fp32, and bf16 with its own kernels."""

from __future__ import annotations

import asyncio

import pytest
import torch

from anything.engine.detokenizer import Tokenizer
from anything.engine.embedded import EmbeddedEngine
from anything.protocol import Chunk, Generation, SamplingParams
from anything.serve_config import EngineConfig
from model.weights.pretrained import load_pretrained

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

PROMPTS = ["a", "def main(", "x" * 37, "0123456789" * 11]


async def answers(uri: str, config: EngineConfig) -> list[list[Chunk]]:
    engine = EmbeddedEngine(uri, config, version="v")
    await engine.start()

    async def collect(prompt: str) -> list[Chunk]:
        return [chunk async for chunk in engine.generate(Generation(prompt, SamplingParams(max_tokens=24)))]

    try:
        return list(await asyncio.gather(*map(collect, PROMPTS)))
    finally:
        await engine.close()


@torch.inference_mode()
def logits_of(uri: str, tokens: list[int], dtype: torch.dtype) -> torch.Tensor:
    model = load_pretrained(uri, dtype=dtype, device="cuda")
    return model.logits(model(torch.tensor([tokens], device="cuda")).hidden_BTD[0]).float()


@pytest.mark.parametrize("kind", ["float32", "int8"])
def test_fp32_equals_decoding_without_a_cache(kind: str, model_folder: str, int8_folder: str) -> None:
    uri = model_folder if kind == "float32" else int8_folder
    tokenizer = Tokenizer(uri)
    config = EngineConfig(device="cuda", dtype="float32", block_tokens=4, prefill_chunk_tokens=16)
    for prompt, chunks in zip(PROMPTS, asyncio.run(answers(uri, config)), strict=True):
        tokens = tokenizer.encode(prompt)
        for _ in range(24):
            token = int(logits_of(uri, tokens, torch.float32)[-1].argmax())
            if token == 1:
                break
            tokens.append(token)
        expected = tokenizer.decode(tokens[len(tokenizer.encode(prompt)) :])
        assert "".join(chunk.text for chunk in chunks) == expected


def test_bf16_runs_with_chunks_and_decoding(model_folder: str) -> None:
    config = EngineConfig(block_tokens=4, prefill_chunk_tokens=16)
    for chunks in asyncio.run(answers(model_folder, config)):
        assert chunks[-1].usage is not None
        assert chunks[-1].finish_reason in ("stop", "length")
