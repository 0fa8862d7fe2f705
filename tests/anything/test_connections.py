"""A server that closes an idle connection just then: one more attempt, and only where the connection was a kept one."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from anything.client import Client
from anything.protocol import Generation, SamplingParams, UnavailableError
from anything.router.remote_engine import RemoteEngine
from anything.sse import DONE, event
from base.errors import ServiceError

JSON = b'{"output": "text"}'
STREAM = event({"text": "te"}) + event({"text": "xt", "finish_reason": "stop"}) + DONE


class RudeServer:
    """A server that closes some connections when a request arrives, without a word.

    Args:
        answers: requests that a connection answers before it is closed, for each connection in order.
    """

    def __init__(self, listener: socket.socket, answers: list[int]) -> None:
        self.requests = 0
        self.connections = 0
        self._listener = listener
        self._answers = answers

    def serve(self) -> None:
        for answers in self._answers:
            connection, _ = self._listener.accept()
            self.connections += 1
            with connection, connection.makefile("rb") as received:
                for number in range(answers + 1):
                    length, stream = 0, False
                    while (line := received.readline()) not in (b"\r\n", b""):
                        length = int(line.split(b":")[1]) if line.lower().startswith(b"content-length") else length
                    if not line:
                        break
                    stream = b"stream" in received.read(length)
                    self.requests += 1
                    if number < answers:
                        body = STREAM if stream else JSON
                        connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body))
        self._listener.close()


@contextmanager
def rude(answers: list[int]) -> Iterator[tuple[str, RudeServer]]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = RudeServer(listener, answers)
        thread = threading.Thread(target=server.serve, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", server
        thread.join(30)
        assert not thread.is_alive()


@pytest.mark.parametrize("ask", [lambda c: c.infer("a"), lambda c: "".join(c.stream("a"))], ids=["whole", "stream"])
def test_a_client_asks_once_more_where_a_kept_connection_is_closed(ask: Callable[[Client], str]) -> None:
    with rude([2, 1]) as (url, server), Client(url, "k") as client:
        assert [ask(client) for _ in range(3)] == ["text"] * 3
        assert (server.requests, server.connections) == (4, 2)


def test_a_client_does_not_ask_again_what_a_fresh_connection_did_not_answer() -> None:
    with rude([0]) as (url, server), Client(url, "k") as client:
        with pytest.raises(ServiceError, match="RemoteProtocolError"):
            client.infer("a")
        assert server.requests == 1
    with rude([1, 0]) as (url, server), Client(url, "k") as client:
        assert client.infer("a") == "text"
        with pytest.raises(ServiceError, match="RemoteProtocolError"):
            client.infer("a")
        assert server.requests == 3


async def remote(url: str, tmp_path: Path, times: int) -> list[str]:
    (tmp_path / "key").write_text("k")
    engine = RemoteEngine(url, str(tmp_path / "key"), "v")
    await engine.start()
    generation = Generation("a", SamplingParams())
    try:
        return ["".join([chunk.text async for chunk in engine.generate(generation)]) for _ in range(times)]
    finally:
        await engine.close()


def test_a_gateway_asks_its_replica_once_more_where_a_kept_connection_is_closed(tmp_path: Path) -> None:
    with rude([2, 1]) as (url, server):
        assert asyncio.run(remote(url, tmp_path, 3)) == ["text"] * 3
        assert (server.requests, server.connections) == (4, 2)


@pytest.mark.parametrize("answers", [[0], [1]], ids=["at once", "on a kept connection"])
def test_a_replica_that_a_request_ended_was_reached(answers: list[int], tmp_path: Path) -> None:
    """Also where nothing listens any more at the second attempt: the request may have ended the replica."""
    with rude(answers) as (url, server):
        with pytest.raises(UnavailableError, match="RemoteProtocolError") as error:
            asyncio.run(remote(url, tmp_path, len(answers) + answers[0]))
        assert (error.value.status, error.value.worth_another_replica) == (502, False)
        assert server.requests == 1 + answers[0]
