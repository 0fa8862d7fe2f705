"""The engine says what greedy decoding without a cache says, whatever else runs beside it."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import threading
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, asynccontextmanager
from pathlib import Path

import pytest
import torch

from anything.client import Client
from anything.engine.detokenizer import Tokenizer
from anything.engine.embedded import EmbeddedEngine
from anything.engine.model_runner import StepOutput
from anything.engine.scheduler import ScheduledChunk
from anything.protocol import Chunk, Generation, RefusedError, SamplingParams, UnavailableError, Usage
from anything.serve_config import EngineConfig
from base.errors import MissingFileError, WeightsError
from model.transformer import DeepseekV3
from model.weights.pretrained import load_pretrained


def cpu(**options: int) -> EngineConfig:
    """fp32 on the CPU, also where there is a GPU, whose rounding may choose another token."""
    return EngineConfig.model_validate({"device": "cpu", "dtype": "float32", **options})


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
async def running(uri: str, config: EngineConfig) -> AsyncGenerator[EmbeddedEngine]:
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
        cpu(block_tokens=16, cache_blocks=256),
        # Prompts in several chunks, few places, blocks for about two sequences: preemption and reuse.
        cpu(block_tokens=4, cache_blocks=52, max_running=4, prefill_chunk_tokens=7),
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
            answers = await asyncio.gather(
                *(collect(engine, Generation(p, SamplingParams(max_tokens=n))) for p, n in asked)
            )
            return list(answers), (await engine.status()).gauges

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


def test_a_cancelled_generation_frees_its_blocks_for_others(model_folder: str) -> None:
    config = cpu(block_tokens=4, cache_blocks=64, prefill_chunk_tokens=8)
    model = load_pretrained(model_folder, dtype=torch.float32)
    tokenizer = Tokenizer(model_folder)
    expected, _ = greedy_without_cache(model, tokenizer.encode(PROMPTS[3]), 40)

    async def main() -> None:
        async with running(model_folder, config) as engine:
            beside = asyncio.create_task(collect(engine, Generation(PROMPTS[3], SamplingParams(max_tokens=40))))
            cancelled = [engine.generate(Generation(prompt, SamplingParams(max_tokens=200))) for prompt in PROMPTS[:3]]
            for stream in cancelled:
                async with aclosing(stream):
                    await anext(stream)
            # Takes the blocks that were given back, while the first one still runs.
            again = await collect(engine, Generation(PROMPTS[3], SamplingParams(max_tokens=40)))
            for chunks in (again, await beside):
                assert "".join(chunk.text for chunk in chunks) == tokenizer.decode(expected)
            gauges = (await engine.status()).gauges
            assert (gauges["cache_blocks_free"], gauges["running"], gauges["waiting"]) == (64, 0, 0)

    asyncio.run(main())


def test_a_cancel_in_the_middle_of_a_step_harms_nobody(model_folder: str) -> None:
    config = cpu(block_tokens=4, cache_blocks=128)

    async def main() -> None:
        async with running(model_folder, config) as engine:
            inside, go_on = threading.Event(), threading.Event()
            step = engine._runner.step

            def held(chunks: Sequence[ScheduledChunk]) -> StepOutput:
                inside.set()
                go_on.wait(30)
                return step(chunks)

            stays, goes = (
                engine.generate(Generation("stays", SamplingParams(max_tokens=30))),
                engine.generate(Generation("goes away", SamplingParams(max_tokens=30))),
            )
            chunks, _ = [await anext(stays)], await anext(goes)
            engine._runner.step = held  # type: ignore[method-assign]
            await asyncio.to_thread(inside.wait)
            await goes.aclose()
            go_on.set()
            chunks += [chunk async for chunk in stays]
            alone = await collect(engine, Generation("stays", SamplingParams(max_tokens=30)))
            assert "".join(chunk.text for chunk in chunks) == "".join(chunk.text for chunk in alone)
            assert (await engine.status()).gauges["cache_blocks_free"] == 128

    asyncio.run(main())


def test_sampling_depends_on_the_seed_alone(model_folder: str) -> None:
    def asked(seed: int, temperature: float = 1.0) -> Generation:
        return Generation("sample", SamplingParams(max_tokens=24, temperature=temperature, seed=seed))

    async def main() -> None:
        async with running(model_folder, cpu()) as engine:
            alone = await collect(engine, asked(3))
            crowd = [asked(seed) for seed in (3, 4, 3, 5)] + [
                Generation(prompt, SamplingParams(max_tokens=24)) for prompt in PROMPTS
            ]
            together = await asyncio.gather(*(collect(engine, generation) for generation in crowd))
            texts = ["".join(chunk.text for chunk in chunks) for chunks in [alone, *together]]
            assert texts[0] == texts[1] == texts[3]
            assert len({texts[0], texts[2], texts[4]}) == 3
            cold, greedy = (
                await collect(engine, asked(9, 1e-30)),
                await collect(engine, Generation("sample", SamplingParams(max_tokens=24))),
            )
            assert [chunk.text for chunk in cold] == [chunk.text for chunk in greedy]

    asyncio.run(main())


def test_the_context_bounds_prompt_and_output(model_folder: str) -> None:
    async def main() -> None:
        async with running(model_folder, cpu(block_tokens=4, cache_blocks=16)) as engine:
            with pytest.raises(RefusedError, match=r"1 to 63 tokens .*got 65"):
                await collect(engine, Generation("p" * 64, SamplingParams(max_tokens=1)))
            chunks = await collect(engine, Generation("p" * 59, SamplingParams(max_tokens=100)))
            assert chunks[-1].usage is not None
            assert chunks[-1].usage.completion_tokens <= 4
        async with running(model_folder, cpu()) as engine:
            with pytest.raises(RefusedError, match="1 to 511 tokens"):
                await collect(engine, Generation("p" * 511, SamplingParams(max_tokens=1)))

    asyncio.run(main())


def test_closing_ends_generations_in_flight(model_folder: str) -> None:
    async def main() -> None:
        async with running(model_folder, cpu()) as engine:
            assert await engine.ready()
            stream = engine.generate(Generation("abc", SamplingParams(max_tokens=500)))
            await anext(stream)
        with pytest.raises(UnavailableError, match="the engine has ended"):
            async for _ in stream:
                pass
        assert not await engine.ready()

    asyncio.run(main())


def test_a_folder_that_cannot_be_served_says_why(model_folder: str, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(model_folder, broken)
    weights = next(broken.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-100])

    async def start(uri: Path) -> None:
        async with running(str(uri), cpu()):
            pass

    with pytest.raises(WeightsError, match=re.escape(weights.name)):
        asyncio.run(start(broken))
    (broken / "tokenizer.json").unlink()
    with pytest.raises(MissingFileError, match=r"tokenizer\.json"):
        asyncio.run(start(broken))


def test_the_end_token_stops_and_is_not_said(model_folder: str, tmp_path: Path) -> None:
    tokenizer = Tokenizer(model_folder)
    prompt = tokenizer.encode("stop here")
    free, _ = greedy_without_cache(load_pretrained(model_folder, dtype=torch.float32), prompt, 30)
    # One that has a text of its own, so that it would be seen if it were said.
    end = next(token for token in free[1:] if tokenizer.decode([token]).isprintable() and tokenizer.decode([token]))
    shutil.copytree(model_folder, tmp_path / "ends")
    config = tmp_path / "ends" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "eos_token_id": end}))

    async def main() -> list[Chunk]:
        async with running(str(tmp_path / "ends"), cpu()) as engine:
            return await collect(engine, Generation("stop here", SamplingParams(max_tokens=30)))

    chunks = asyncio.run(main())
    said = free[: free.index(end)]
    assert "".join(chunk.text for chunk in chunks) == tokenizer.decode(said)
    assert (chunks[-1].finish_reason, chunks[-1].usage) == ("stop", Usage(len(prompt), len(said)))


def test_an_answer_over_http_is_greedy_decoding(
    model_folder: str, serve: Callable[..., str], key_file: tuple[str, str]
) -> None:
    model, tokenizer = load_pretrained(model_folder, dtype=torch.float32), Tokenizer(model_folder)
    url = serve(EmbeddedEngine(model_folder, cpu(), version="v"))
    with Client(url, key_file[1]) as client, ThreadPoolExecutor(len(PROMPTS)) as pool:
        answers = pool.map(lambda prompt: client.infer(prompt, max_tokens=20), PROMPTS)
        streams = pool.map(lambda prompt: "".join(client.stream(prompt, max_tokens=20)), PROMPTS)
        for prompt, answer, stream in zip(PROMPTS, answers, streams, strict=True):
            expected = tokenizer.decode(greedy_without_cache(model, tokenizer.encode(prompt), 20)[0])
            assert answer == stream == expected
