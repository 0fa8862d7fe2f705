"""One error shape everywhere: unknown paths, wrong methods, bugs, and errors in the middle of a stream."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable

import httpx
import pytest

from anything.protocol import Chunk, Generation
from anything.testing import EchoEngine

Serve = Callable[..., str]
PATH = "/v1/anything/infer"


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/v1/anything/infers", 404, "not_found"),
        ("GET", "/v1/anything/infer", 405, "method_not_allowed"),
        ("DELETE", "/healthz", 405, "method_not_allowed"),
        ("OPTIONS", "/v1/anything/infer", 405, "method_not_allowed"),
    ],
)
def test_wrong_paths_and_methods_have_the_one_error_shape(
    method: str, path: str, status: int, code: str, serve: Serve, ask: httpx.Client
) -> None:
    answer = ask.request(method, serve(EchoEngine()) + path)
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
    assert path in answer.json()["error"]["message"]
    assert ("allow" in answer.headers) == (status == 405)


class Failing(EchoEngine):
    """An engine with a bug, at its first or second chunk, and in its status."""

    def __init__(self, chunks: int) -> None:
        super().__init__()
        self.chunks = chunks

    async def generate(self, generation: Generation) -> AsyncIterator[Chunk]:
        for _ in range(self.chunks):
            yield Chunk("one ", self.version)
        raise KeyError("private words")


@pytest.mark.parametrize("stream", [False, True])
def test_a_bug_is_a_500_of_the_one_error_shape(stream: bool, serve: Serve, ask: httpx.Client) -> None:
    answer = ask.post(serve(Failing(0)) + PATH, json={"prompt": "a", "stream": stream})
    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "internal")
    assert "private" not in answer.text
    late = ask.post(serve(Failing(1)) + PATH, json={"prompt": "a", "stream": True})
    first, error = [json.loads(line.removeprefix("data: ")) for line in late.text.split("\n\n") if line]
    assert first == {"text": "one "}
    assert error["error"]["code"] == "internal"
