"""The API over a real server: answers, streams, statuses, deadlines, and what is kept out of logs."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Callable, MutableMapping
from typing import Any

import httpx
import pytest
from starlette.requests import Request

from anything.engine.embedded import EmbeddedEngine
from anything.http.app import EventStream, Gateway, create_app
from anything.http.request import Call
from anything.keys import create_key, list_keys, load_keys, revoke_key
from anything.protocol import Chunk, Deadline, EngineStatus, Generation, SamplingParams, UnavailableError
from anything.serve_config import EngineConfig, ServeConfig
from anything.testing import EchoEngine

Serve = Callable[..., str]
PATH = "/v1/anything/infer"


def body(prompt: str = "one two three", **more: object) -> dict[str, object]:
    return {"prompt": prompt, **more}


def events(response: httpx.Response) -> list[object]:
    """The JSON of each event, and `None` for [DONE]."""
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    return [None if line == "[DONE]" else json.loads(line) for line in lines]


def test_an_answer(serve: Serve, ask: httpx.Client) -> None:
    url = serve(EchoEngine("v7"))
    answer = ask.post(url + PATH, json=body(max_tokens=2, temperature=0.5, stream=False))
    assert (answer.status_code, answer.headers["x-anything-version"]) == (200, "v7")
    assert answer.json() == {
        "output": "one two ",
        "finish_reason": "length",
        "model": "v7",
        "usage": {"prompt_tokens": 3, "completion_tokens": 2},
    }
    assert ask.post(url + PATH, json=body()).json()["finish_reason"] == "stop"


def test_a_stream(serve: Serve, ask: httpx.Client) -> None:
    url = serve(EchoEngine("v7"))
    # More tokens than an answer in one piece may have.
    answer = ask.post(url + PATH, json=body(stream=True, max_tokens=100_000))
    assert (answer.status_code, answer.headers["x-anything-version"]) == (200, "v7")
    assert answer.headers["content-type"].startswith("text/event-stream")
    usage = {"prompt_tokens": 3, "completion_tokens": 3}
    assert events(answer) == [
        {"text": "one "},
        {"text": "two "},
        {"text": "three", "finish_reason": "stop", "usage": usage},
        None,
    ]


@pytest.mark.parametrize(
    "header", [None, "", "Bearer", "Bearer wrong", "Basic {key}", "{key}", "Bearer {key}x", "Bearer  any-é"]
)
def test_a_missing_or_wrong_token_is_401_before_the_body_is_looked_at(
    header: str | None, serve: Serve, key_file: tuple[str, str]
) -> None:
    url = serve(EchoEngine())
    value = None if header is None else header.format(key=key_file[1]).encode()
    headers = {} if value is None else {"authorization": value}
    answer = httpx.post(url + PATH, content=b"not json", headers=headers, trust_env=False)
    assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
    assert answer.json()["error"]["code"] == "authentication"


def test_a_revoked_key_is_403(serve: Serve, key_file: tuple[str, str]) -> None:
    path, key = key_file
    create_key(path)
    revoke_key(path, list_keys(path)[0].key_id)
    url = serve(EchoEngine())
    answer = httpx.post(url + PATH, json=body(), headers={"authorization": f"Bearer {key}"}, trust_env=False)
    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "key_revoked")


@pytest.mark.parametrize(
    ("sent", "message"),
    [
        (b"{", "JSON"),
        (b"[]", "object"),
        (b"{}", "prompt"),
        (b'{"prompt": ""}', "prompt"),
        (b'{"prompt": 5}', "prompt"),
        (b'{"prompt": "a", "max_token": 5}', "max_token"),
        (b'{"prompt": "a", "max_tokens": "5"}', "max_tokens"),
        (b'{"prompt": "a", "max_tokens": 0}', "max_tokens"),
        (b'{"prompt": "a", "max_tokens": 1.5}', "max_tokens"),
        (b'{"prompt": "a", "max_tokens": 2049}', "stream"),
        (b'{"prompt": "a", "temperature": -0.1}', "temperature"),
        (b'{"prompt": "a", "temperature": NaN}', "temperature"),
        (b'{"prompt": "a", "temperature": 1e999}', "temperature"),
        (b'{"prompt": "a", "stream": "yes"}', "stream"),
        (b'{"prompt": "\\ud800"}', "JSON"),
        (b'{"prompt": "\xff"}', "JSON"),
    ],
)
def test_a_wrong_body_is_422_and_names_the_key(sent: bytes, message: str, serve: Serve, ask: httpx.Client) -> None:
    engine = EchoEngine()
    answer = ask.post(serve(engine) + PATH, content=sent)
    assert (answer.status_code, answer.json()["error"]["code"]) == (422, "invalid_request")
    assert message in answer.json()["error"]["message"]
    assert engine.started == 0


@pytest.mark.parametrize("stream", [False, True, None])
def test_null_for_an_optional_key_is_its_default(stream: bool | None, serve: Serve, ask: httpx.Client) -> None:
    url = serve(EchoEngine())
    sent = body(max_tokens=None, temperature=None, seed=None, stream=stream)
    answer = ask.post(url + PATH, json=sent)
    assert answer.status_code == 200
    assert answer.text == ask.post(url + PATH, json=body(stream=bool(stream))).text
    refused = ask.post(url + PATH, json={"prompt": None})
    assert (refused.status_code, "prompt" in refused.text) == (422, True)


@pytest.mark.parametrize("path", ["/", "/healthz", "/readyz", "/metrics"])
def test_head_is_answered_where_get_is(path: str, serve: Serve, ask: httpx.Client) -> None:
    url = serve(EchoEngine())
    answer = ask.head(url + path)
    assert (answer.status_code, answer.content) == (200, b"")


def test_the_root_says_what_is_here(serve: Serve, ask: httpx.Client, model_folder: str) -> None:
    url = serve(EmbeddedEngine(model_folder, EngineConfig(device="cpu"), version="tiny-v3"))
    answer = ask.get(url + "/").json()
    assert (answer["name"], answer["models"]) == ("Anything", ["tiny-v3"])
    for method, path in (told.split() for told in answer.values() if isinstance(told, str) and " " in told):
        assert ask.request(method, url + path).status_code not in (404, 405) or path.endswith("routes")


def test_web_pages_may_ask_only_from_the_origins_that_are_named(serve: Serve, ask: httpx.Client) -> None:
    url = serve(EchoEngine(), ServeConfig(port=0, cors_origins=("https://a.example",)))
    wanted = {"access-control-request-method": "POST", "access-control-request-headers": "authorization"}
    allowed = ask.options(url + PATH, headers={"origin": "https://a.example", **wanted})
    assert (allowed.status_code, allowed.headers["access-control-allow-origin"]) == (200, "https://a.example")
    other = ask.options(url + PATH, headers={"origin": "https://b.example", **wanted})
    assert "access-control-allow-origin" not in other.headers
    answer = ask.post(url + PATH, json=body(stream=True), headers={"origin": "https://a.example"})
    assert answer.headers["access-control-allow-origin"] == "https://a.example"
    assert "three" in answer.text
    closed = ask.post(serve(EchoEngine()) + PATH, json=body(), headers={"origin": "https://a.example"})
    assert "access-control-allow-origin" not in closed.headers


class Broken(EchoEngine):
    """An engine that is broken for good."""

    async def status(self) -> EngineStatus:
        return EngineStatus(failure="the device is lost")

    async def ready(self) -> bool:
        return False


def test_health_tells_the_truth(key_file: tuple[str, str]) -> None:
    async def main() -> None:
        app = create_app(Broken(), ServeConfig(), load_keys(key_file[0]))
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            alive, ready = await client.get("/healthz"), await client.get("/readyz")
        assert (alive.status_code, alive.json()) == (503, {"status": "failed", "reason": "the device is lost"})
        assert ready.status_code == 503

    asyncio.run(main())


def test_a_body_that_arrives_slowly_leaves_less_time_for_the_answer(
    key_file: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    left: list[float] = []

    class Recording(EchoEngine):
        def generate(self, generation: Generation) -> AsyncIterator[Chunk]:
            assert generation.deadline is not None
            left.append(generation.deadline.remaining_s())
            return super().generate(generation)

    async def receive() -> MutableMapping[str, Any]:
        nonlocal now
        if now:
            await asyncio.Event().wait()  # the client waits for its answer
        now += 20.0
        return {"type": "http.request", "body": json.dumps(body()).encode()}

    async def main() -> None:
        gateway = Gateway(Recording(), ServeConfig(timeout_s=30.0), load_keys(key_file[0]))
        await gateway.start()
        headers = [(b"authorization", f"Bearer {key_file[1]}".encode())]
        await gateway.infer(Request({"type": "http", "method": "POST", "headers": headers}, receive))

    monkeypatch.setattr("anything.http.app.Deadline", lambda timeout_s: Deadline(timeout_s, clock=lambda: now))
    asyncio.run(main())
    assert left == [10.0]


def test_overload_is_429_with_retry_after(serve: Serve, ask: httpx.Client) -> None:
    engine = EchoEngine(tokens=1, limit=1)
    url = serve(engine)
    with ask.stream("POST", url + PATH, json=body(stream=True)) as first:
        assert engine.wait_for("started", 1)
        second = ask.post(url + PATH, json=body())
        assert (second.status_code, second.headers["retry-after"]) == (429, "1")
        engine.let(None)
        first.read()
    assert events(first)[-1] is None


def test_a_stream_is_bounded_at_the_first_token_and_at_every_gap(serve: Serve, ask: httpx.Client) -> None:
    engine = EchoEngine(tokens=0)
    url = serve(engine, ServeConfig(port=0, timeout_s=0.3))
    first = ask.post(url + PATH, json=body(stream=True))
    assert (first.status_code, first.json()["error"]["code"]) == (504, "timeout")
    engine.let(2)
    gap = ask.post(url + PATH, json=body(stream=True))
    assert gap.status_code == 200
    *texts, error = events(gap)
    assert texts == [{"text": "one "}, {"text": "two "}]
    assert isinstance(error, dict)
    assert error["error"]["code"] == "timeout"
    assert engine.wait_for("cancelled", 2)


def test_every_token_of_a_stream_starts_the_time_anew() -> None:
    now = 0.0
    left: list[float] = []

    async def send(message: MutableMapping[str, Any]) -> None:
        nonlocal now
        if message.get("body"):
            left.append(deadline.remaining_s())
            now += 6.0

    async def receive() -> MutableMapping[str, Any]:
        raise AssertionError("the body was read before")

    async def main() -> None:
        call = Call(deadline)
        call.begin(EchoEngine(), Generation("1 2 3", SamplingParams(max_tokens=9)))
        stream = EventStream(call, await call.next(), deadline, lambda chunk: None, call.close)
        await stream({"type": "http"}, receive, send)

    deadline = Deadline(10.0, clock=lambda: now)
    asyncio.run(main())
    assert left == [10.0] * 4


def test_an_engine_failure_is_a_status_before_the_first_byte_and_an_event_after_it(
    serve: Serve, ask: httpx.Client
) -> None:
    engine = EchoEngine(tokens=1)
    url = serve(engine)
    with ask.stream("POST", url + PATH, json=body(stream=True)) as answer:
        lines = answer.iter_lines()
        assert json.loads(next(lines).removeprefix("data: ")) == {"text": "one "}
        engine.fail(UnavailableError("the device is lost", status=503, code="engine_failed", retry_after_s=5))
        rest = [line for line in lines if line]
    assert [json.loads(line.removeprefix("data: ")) for line in rest] == [
        {"error": {"code": "engine_failed", "message": "the device is lost"}}
    ]
    answer = ask.post(url + PATH, json=body())
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
    assert ask.get(url + "/readyz").status_code == 503
    assert ask.get(url + "/healthz").status_code == 200


def test_the_seed_of_a_request_decides_what_is_sampled(serve: Serve, ask: httpx.Client, model_folder: str) -> None:
    url = serve(EmbeddedEngine(model_folder, EngineConfig(device="cpu"), version="v"))

    def output(seed: object) -> str:
        answer = ask.post(url + PATH, json=body("sample", max_tokens=24, temperature=1.5, seed=seed))
        assert answer.status_code == 200, answer.text
        return str(answer.json()["output"])

    assert output(3) == output(3)
    assert len({output(seed) for seed in (3, 4, 5)}) > 1
    refused = ask.post(url + PATH, json=body(seed=-1))
    assert (refused.status_code, "seed" in refused.text) == (422, True)


def test_neither_key_nor_prompt_reaches_a_log(
    serve: Serve, ask: httpx.Client, key_file: tuple[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, logger="anything")
    caplog.set_level(logging.DEBUG, logger="uvicorn")
    url = serve(EchoEngine())
    ask.post(url + PATH, json=body("private words"))
    ask.post(url + PATH, json=body("private words", extra="private"))
    ask.post(url + PATH, json=body("x"), headers={"authorization": "Bearer secret-but-wrong"})
    assert "private" not in caplog.text
    assert "secret-but-wrong" not in caplog.text
    assert key_file[1] not in caplog.text


def test_a_stream_that_is_not_read_is_given_up() -> None:
    async def send(message: MutableMapping[str, Any]) -> None:
        if message.get("body"):
            await asyncio.Event().wait()

    async def receive() -> MutableMapping[str, Any]:
        raise AssertionError("the body was read before")

    async def main() -> None:
        deadline = Deadline(0.1)
        call = Call(deadline)
        call.begin(engine, Generation("1 2 3", SamplingParams(max_tokens=9)))
        stream = EventStream(call, await call.next(), deadline, lambda chunk: None, call.close)
        await stream({"type": "http"}, receive, send)

    engine = EchoEngine()
    asyncio.run(main())
    assert (engine.finished, engine.cancelled) == (0, 1)
