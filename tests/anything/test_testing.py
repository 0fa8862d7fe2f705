"""The echo engine of the tests: it holds at an exact token, counts what became of generations, and has a limit."""

from __future__ import annotations

import asyncio
from contextlib import aclosing

import pytest

from anything.protocol import Chunk, Generation, SamplingParams, UnavailableError, Usage
from anything.testing import EchoEngine


def asked(prompt: str, max_tokens: int = 99) -> Generation:
    return Generation(prompt, SamplingParams(max_tokens=max_tokens))


async def collect(engine: EchoEngine, generation: Generation) -> list[Chunk]:
    return [chunk async for chunk in engine.generate(generation)]


@pytest.mark.parametrize(("prompt", "words"), [("one", 1), ("one two  three\n", 3), (" ", 1), ("  one", 2)])
def test_an_echo_is_the_prompt_word_by_word(prompt: str, words: int) -> None:
    chunks = asyncio.run(collect(EchoEngine("v3"), asked(prompt)))
    assert "".join(chunk.text for chunk in chunks) == prompt
    assert {chunk.version for chunk in chunks} == {"v3"}
    assert [chunk.finish_reason for chunk in chunks] == [None] * (words - 1) + ["stop"]
    assert chunks[-1].usage == Usage(words, words)


def test_an_echo_ends_at_the_limit_of_tokens() -> None:
    chunks = asyncio.run(collect(EchoEngine(), asked("one two three", max_tokens=2)))
    assert [chunk.text for chunk in chunks] == ["one ", "two "]
    assert (chunks[-1].finish_reason, chunks[-1].usage) == ("length", Usage(3, 2))


def test_it_holds_at_an_exact_token_until_more_are_allowed() -> None:
    async def main() -> None:
        engine = EchoEngine(tokens=1)
        stream = engine.generate(asked("one two three"))
        assert (await anext(stream)).text == "one "
        waiting = asyncio.ensure_future(anext(stream))
        await asyncio.sleep(0)
        assert not waiting.done()
        engine.let(1)
        assert (await waiting).text == "two "
        engine.let(None)
        assert (await anext(stream)).text == "three"
        assert (engine.started, engine.finished, engine.cancelled) == (1, 1, 0)

    asyncio.run(main())


def test_a_closed_generation_is_cancelled_and_gives_its_place_back() -> None:
    async def main() -> None:
        engine = EchoEngine(limit=1)
        async with aclosing(engine.generate(asked("one two"))) as stream:
            await anext(stream)
            with pytest.raises(UnavailableError) as refused:
                await collect(engine, asked("one"))
            assert (refused.value.status, refused.value.retry_after_s) == (429, 1)
            assert (await engine.status()).gauges == {"running": 1}
        assert engine.wait_for("cancelled", 1)
        assert (await engine.status()).gauges == {"running": 0}
        assert len(await collect(engine, asked("one"))) == 1

    asyncio.run(main())


def test_a_failure_reaches_a_generation_that_waits_and_can_be_repaired() -> None:
    async def main() -> None:
        engine = EchoEngine(tokens=0)
        waiting = asyncio.ensure_future(collect(engine, asked("one")))
        await asyncio.sleep(0)
        engine.fail(UnavailableError("lost", status=503, code="engine_failed"))
        with pytest.raises(UnavailableError, match="lost"):
            await waiting
        assert not await engine.ready()
        engine.fail(None)
        engine.let(None)
        assert await engine.ready()
        assert len(await collect(engine, asked("one"))) == 1

    asyncio.run(main())


def test_waiting_for_a_counter_that_is_not_reached_returns_false() -> None:
    assert EchoEngine().wait_for("started", 0)
    assert not EchoEngine().wait_for("started", 1, timeout_s=0.0)
