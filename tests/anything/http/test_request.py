"""One request in flight: bodies that are too large or late, answers that are, and clients that disconnect."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Callable

import httpx
import pytest

from anything.http.request import Call
from anything.protocol import Chunk, Deadline, Generation, SamplingParams, UnavailableError
from anything.serve_config import ServeConfig
from anything.testing import EchoEngine

Serve = Callable[..., str]
PATH = "/v1/anything/infer"


def body(prompt: str = "one two three", **more: object) -> dict[str, object]:
    return {"prompt": prompt, **more}


def events(response: httpx.Response) -> list[object]:
    """The JSON of each event, and `None` for [DONE]."""
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    return [None if line == "[DONE]" else json.loads(line) for line in lines]


def test_too_large_a_body_is_413_declared_or_not(serve: Serve, ask: httpx.Client) -> None:
    url = serve(EchoEngine(), ServeConfig(port=0, max_request_bytes=1000))
    assert ask.post(url + PATH, json=body("x" * 900)).status_code == 200
    declared = ask.post(url + PATH, json=body("x" * 1000))
    chunked = ask.post(url + PATH, content=iter([b"x" * 600, b"x" * 600]))
    for answer in (declared, chunked):
        assert (answer.status_code, answer.json()["error"]["code"]) == (413, "too_large")


def test_a_body_that_does_not_arrive_is_408(
    serve: Serve, key_file: tuple[str, str], connect: Callable[..., socket.socket]
) -> None:
    url = serve(EchoEngine(), ServeConfig(port=0, timeout_s=0.2))
    with connect(url, key_file[1], body(), missing_bytes=1) as connection:
        assert b" 408 " in connection.makefile("rb").readline()


def test_an_answer_that_takes_too_long_is_504_and_cancelled(serve: Serve, ask: httpx.Client) -> None:
    engine = EchoEngine(tokens=1)
    url = serve(engine, ServeConfig(port=0, timeout_s=0.2))
    answer = ask.post(url + PATH, json=body())
    assert (answer.status_code, answer.json()["error"]["code"]) == (504, "timeout")
    assert engine.wait_for("cancelled", 1)
    engine.let(None)
    assert ask.post(url + PATH, json=body()).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_disconnects_cancels_its_generation(
    stream: bool, serve: Serve, key_file: tuple[str, str], ask: httpx.Client, connect: Callable[..., socket.socket]
) -> None:
    engine = EchoEngine(tokens=1)
    url = serve(engine)
    with connect(url, key_file[1], body(stream=stream)) as connection:
        if stream:
            assert b"one" in b"".join(iter(lambda: connection.recv(1), b"}"))
        else:
            assert engine.wait_for("started", 1)
    assert engine.wait_for("cancelled", 1)
    assert engine.finished == 0


def test_an_interrupted_request_raises_what_interrupted_it_and_cancels_its_generation() -> None:
    async def main() -> None:
        engine = EchoEngine(tokens=1)
        call = Call(Deadline(60.0))
        call.begin(engine, Generation("one two three", SamplingParams()))
        assert (await call.next()).text == "one "
        waiting = asyncio.ensure_future(call.next())
        await asyncio.sleep(0)
        call.interrupt(UnavailableError("draining", status=503, code="draining"))
        call.interrupt(UnavailableError("too late", status=504, code="timeout"))
        with pytest.raises(UnavailableError, match="draining"):
            await waiting
        await call.close()
        assert (engine.finished, engine.cancelled) == (0, 1)

    asyncio.run(main())


def test_chunks_end_with_the_one_that_has_a_finish_reason() -> None:
    async def main() -> list[str | None]:
        call = Call(Deadline(60.0))
        call.begin(EchoEngine(), Generation("one two three", SamplingParams()))
        return [chunk.finish_reason async for chunk in call.chunks()]

    assert asyncio.run(main()) == [None, None, "stop"]


def test_an_engine_that_ends_without_a_final_chunk_is_502() -> None:
    class Mute(EchoEngine):
        async def generate(self, generation: Generation) -> AsyncIterator[Chunk]:
            yield Chunk("one", self.version)

    async def main() -> None:
        call = Call(Deadline(60.0))
        call.begin(Mute(), Generation("one", SamplingParams()))
        with pytest.raises(UnavailableError, match="without a final chunk") as error:
            [chunk async for chunk in call.chunks()]
        assert (error.value.status, error.value.code) == (502, "engine_failed")

    asyncio.run(main())
