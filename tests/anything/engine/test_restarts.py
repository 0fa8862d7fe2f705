"""Requests that fail end alone; an engine that fails as a whole is started again, a bounded number of times."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from anything.engine.detokenizer import Tokenizer
from anything.engine.embedded import EmbeddedEngine
from anything.engine.model_runner import StepOutput
from anything.engine.restarts import MAX_RESTARTS, WINDOW_S, RestartBudget
from anything.engine.scheduler import ScheduledChunk
from anything.protocol import Generation, GenerationError, SamplingParams, UnavailableError
from anything.serve_config import EngineConfig
from model.weights.pretrained import load_pretrained, save_pretrained, state_to_hf

BLOCKS = 64
CONFIG = EngineConfig(device="cpu", dtype="float32", block_tokens=4, cache_blocks=BLOCKS, prefill_chunk_tokens=8)
POISON = "Z"


@asynccontextmanager
async def running(uri: str) -> AsyncGenerator[EmbeddedEngine]:
    engine = EmbeddedEngine(uri, CONFIG, version="v")
    await engine.start()
    try:
        yield engine
    finally:
        await engine.close()


async def answer(engine: EmbeddedEngine, prompt: str, temperature: float = 0.0, max_tokens: int = 12) -> str:
    sampling = SamplingParams(max_tokens=max_tokens, temperature=temperature, seed=1)
    return "".join([chunk.text async for chunk in engine.generate(Generation(prompt, sampling))])


async def is_idle(engine: EmbeddedEngine) -> bool:
    gauges = (await engine.status()).gauges
    return (gauges["running"], gauges["waiting"], gauges["cache_blocks_free"]) == (0, 0, BLOCKS)


@pytest.fixture(scope="module")
def poisoned_folder(model_folder: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The model, but the embedding of one token is NaN."""
    model = load_pretrained(model_folder, dtype=torch.float32)
    target = tmp_path_factory.mktemp("poisoned") / "export"
    tokenizer = Path(model_folder) / "tokenizer.json"
    token = Tokenizer(model_folder).encode(POISON)[-1]
    model.embed_tokens.weight.data[token] = float("nan")
    tensors = [pair for name, tensor in model.state_dict().items() for pair in state_to_hf(name, tensor, model.config)]
    save_pretrained(tensors, str(target), model.config, dtype=torch.float32, tokenizer_uri=str(tokenizer))
    shutil.copy(tokenizer, target / "tokenizer.json")
    return str(target)


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0, 1e-46])
def test_a_prompt_whose_numbers_are_not_finite_fails_alone(
    temperature: float, model_folder: str, poisoned_folder: str
) -> None:
    prompts = ["a", "def main(", "x" * 37, "0123456789" * 5]
    poisonous = [POISON, f"x = {POISON}", POISON * 20, f"{'y' * 30}{POISON}{'y' * 30}"]

    async def main() -> None:
        async with running(model_folder) as sound:
            expected = [await answer(sound, prompt, temperature) for prompt in prompts]
        async with running(poisoned_folder) as engine:
            mixed = [text for pair in zip(poisonous, prompts, strict=True) for text in pair]
            asked = [answer(engine, prompt, temperature) for prompt in mixed]
            answers = await asyncio.gather(*asked, return_exceptions=True)
            for failed in answers[::2]:
                assert isinstance(failed, GenerationError)
                assert (failed.status, failed.code, failed.worth_another_replica) == (500, "generation_failed", False)
                assert "not a number" in str(failed)
            assert answers[1::2] == expected
            # In the blocks that the failed ones gave back.
            assert [await answer(engine, prompt, temperature) for prompt in prompts] == expected
            assert (await engine.status()).gauges["failed_generations"] == len(poisonous)
            assert await is_idle(engine)
            assert await engine.ready()

    asyncio.run(main())


@pytest.mark.parametrize("temperature", [5e-324, 1e-320, 1e-60, 1e-46, 1e-45, 1e-6])
def test_a_tiny_temperature_is_greedy(temperature: float, model_folder: str) -> None:
    async def main() -> None:
        async with running(model_folder) as engine:
            assert await answer(engine, "def f(", temperature) == await answer(engine, "def f(", 0.0)

    asyncio.run(main())


class Panic(BaseException):
    """What a library in Rust raises when it panics: no Exception."""


@pytest.mark.parametrize("error", [ValueError("no text"), Panic("index out of range")])
def test_text_that_cannot_be_decoded_ends_its_generation_alone(error: BaseException, model_folder: str) -> None:
    async def main() -> None:
        async with running(model_folder) as engine:
            expected = await answer(engine, "beside")
            submit = engine._submit

            def fail(_: int) -> str:
                raise error

            def submit_and_break(prompt: list[int], generation: Generation) -> Any:
                job = submit(prompt, generation)
                if generation.prompt == "bad":
                    job.detokenizer.push = fail  # type: ignore[method-assign]
                return job

            engine._submit = submit_and_break  # type: ignore[method-assign]
            asked = [answer(engine, prompt) for prompt in ("bad", "beside", "bad")]
            bad, beside, worse = await asyncio.gather(*asked, return_exceptions=True)
            assert beside == expected
            for failed in (bad, worse):
                assert isinstance(failed, GenerationError)
                assert type(error).__name__ in str(failed)
            assert await is_idle(engine)

    asyncio.run(main())


@pytest.mark.parametrize("error", [ValueError("no tokens"), Panic("index out of range")])
def test_a_prompt_that_cannot_be_encoded_is_an_error_of_its_own(error: BaseException, model_folder: str) -> None:
    async def main() -> None:
        async with running(model_folder) as engine:
            encode = engine._tokenizer.encode

            def fail(text: str) -> list[int]:
                if text == "bad":
                    raise error
                return encode(text)

            engine._tokenizer.encode = fail  # type: ignore[method-assign]
            with pytest.raises(GenerationError, match=type(error).__name__):
                await answer(engine, "bad")
            assert await answer(engine, "good")

    asyncio.run(main())


def test_a_step_that_raises_for_one_sequence_ends_that_one_alone(model_folder: str) -> None:
    prompts = ["a", "def main(", "x" * 37, "0123456789" * 3]

    async def main() -> None:
        async with running(model_folder) as engine:
            expected = [await answer(engine, prompt) for prompt in prompts]
            bad = engine._tokenizer.encode("bad one")
            step = engine._runner.step

            def failing(chunks: Sequence[ScheduledChunk]) -> StepOutput:
                if any(chunk.sequence.prompt == bad for chunk in chunks):
                    raise RuntimeError("an index is out of range")
                return step(chunks)

            engine._runner.step = failing  # type: ignore[method-assign]
            asked = [answer(engine, prompt) for prompt in ["bad one", *prompts, "bad one"]]
            answers = await asyncio.gather(*asked, return_exceptions=True)
            assert answers[1:-1] == expected
            for failed in (answers[0], answers[-1]):
                assert isinstance(failed, GenerationError)
                assert "RuntimeError" in str(failed)
            # Any number of them: the engine is sound.
            for _ in range(MAX_RESTARTS + 2):
                with pytest.raises(GenerationError):
                    await answer(engine, "bad one")
            assert await answer(engine, prompts[0]) == expected[0]
            assert (await engine.status()).gauges["restarts"] == 0
            assert await is_idle(engine)

    asyncio.run(main())


def test_a_broken_cache_is_made_anew(model_folder: str) -> None:
    async def main() -> None:
        async with running(model_folder) as engine:
            expected = await answer(engine, "abc")
            stream = engine.generate(Generation("abc", SamplingParams(max_tokens=100)))
            await anext(stream)
            engine._runner.cache_LZX = torch.zeros(0, 0, 0)
            with pytest.raises(GenerationError, match="the engine failed on this request"):
                async for _ in stream:
                    pass
            assert await engine.ready()
            assert await answer(engine, "abc") == expected
            assert await is_idle(engine)

    asyncio.run(main())


def test_a_scheduler_that_fails_is_made_anew(model_folder: str) -> None:
    async def main() -> None:
        async with running(model_folder) as engine:
            expected = await answer(engine, "abc")

            def fail() -> list[ScheduledChunk]:
                raise AssertionError("block 3 is freed twice")

            engine._scheduler.schedule = fail  # type: ignore[method-assign]
            with pytest.raises(GenerationError):
                await answer(engine, "abc")
            assert await answer(engine, "abc") == expected
            status = await engine.status()
            assert (status.gauges["restarts"], status.failure) == (1, None)

    asyncio.run(main())


def test_an_engine_that_cannot_be_started_again_says_so(model_folder: str) -> None:
    def lost(_: Sequence[ScheduledChunk]) -> StepOutput:
        raise RuntimeError("the device is lost")

    async def main() -> None:
        async with running(model_folder) as engine:
            engine._runner.step = lost  # type: ignore[method-assign]
            with pytest.raises(GenerationError):
                await answer(engine, "abc")
            assert engine._thread is not None
            await asyncio.to_thread(engine._thread.join, 30)
            with pytest.raises(UnavailableError, match="the engine is broken") as error:
                await answer(engine, "abc")
            assert (error.value.status, error.value.code) == (503, "engine_down")
            assert error.value.worth_another_replica
            assert not await engine.ready()
            status = await engine.status()
            assert status.failure is not None
            assert "Start the server again" in status.failure
            assert status.gauges["restarts"] == MAX_RESTARTS

    asyncio.run(main())


def test_the_budget_is_of_one_window() -> None:
    now = 0.0
    budget = RestartBudget(clock=lambda: now)
    assert [budget.take() for _ in range(MAX_RESTARTS + 1)] == [True] * MAX_RESTARTS + [False]
    now = WINDOW_S
    assert [budget.take() for _ in range(MAX_RESTARTS + 1)] == [True] * MAX_RESTARTS + [False]
    assert budget.taken == 2 * MAX_RESTARTS
