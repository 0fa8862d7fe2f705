"""A server from its socket to its end: ready once loaded; draining, requests in flight finish or get a 503."""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from anything.http.app import create_app
from anything.http.serve import DrainingServer, bind, url_of
from anything.keys import load_keys
from anything.protocol import EngineStatus, UnavailableError
from anything.serve_config import ServeConfig
from anything.testing import EchoEngine
from base.errors import InvalidInputError, PortInUseError, ServiceError

PATH = "/v1/anything/infer"


def body(prompt: str = "one two three", **more: object) -> dict[str, object]:
    return {"prompt": prompt, **more}


# Serves an echo that holds until a line on stdin says how many tokens it lets through.
_PROGRAM = """
import sys, threading
from anything.serve_config import ServeConfig
from anything.testing import EchoEngine
from base.errors import InvalidInputError, PortInUseError
from anything.http.app import create_app
from anything.keys import load_keys
from anything.http.serve import DrainingServer, bind

engine = EchoEngine(tokens=1)
config = ServeConfig(port=0, shutdown_timeout_s=float(sys.argv[2]))
threading.Thread(target=lambda: [engine.let(int(line)) for line in sys.stdin], daemon=True).start()
server = DrainingServer(create_app(engine, config, load_keys(sys.argv[1])), bind("127.0.0.1", 0), sys.argv[3])
server.on_ready = lambda: print("ready", flush=True)
server.run()
print("left", engine.started, engine.finished, engine.cancelled, "torch" in sys.modules, flush=True)
"""


@pytest.mark.parametrize("finishes", [True, False])
def test_sigterm_drains_and_exits_0(
    finishes: bool, tmp_path: Path, key_file: tuple[str, str], ask: httpx.Client
) -> None:
    port_file = tmp_path / "port.json"
    timeout_s = "60" if finishes else "0.2"
    command = [sys.executable, "-c", _PROGRAM, key_file[0], timeout_s, str(port_file)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        record = json.loads(port_file.read_text())
        assert record["pid"] == process.pid
        url = record["url"]
        with ask.stream("POST", url + PATH, json=body(stream=True)) as answer:
            chunks = answer.iter_text()
            assert "one" in next(chunks)
            process.terminate()
            while finishes and ask.get(url + "/readyz").status_code == 200:
                pass
            if finishes:
                assert ask.get(url + "/readyz").json() == {"status": "draining"}
                assert ask.get(url + "/healthz").status_code == 200
                refused = ask.post(url + PATH, json=body())
                assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
                assert "retry-after" in refused.headers
                process.stdin.write("10\n")
                process.stdin.flush()
            rest = "".join(chunks)
        assert rest.endswith("data: [DONE]\n\n") is finishes
        assert ('"code":"draining"' in rest) is not finishes
        assert process.stdout.readline() == ("left 1 1 0 False\n" if finishes else "left 1 0 1 False\n")
        assert process.wait(30) == 0
    assert not port_file.exists()


@pytest.mark.parametrize("arrives", [True, False])
def test_a_request_whose_body_is_still_arriving_gets_503_while_draining(
    arrives: bool,
    tmp_path: Path,
    key_file: tuple[str, str],
    ask: httpx.Client,
    connect: Callable[..., socket.socket],
) -> None:
    port_file = tmp_path / "port.json"
    command = [sys.executable, "-c", _PROGRAM, key_file[0], "60" if arrives else "0.2", str(port_file)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        url = json.loads(port_file.read_text())["url"]
        with connect(url, key_file[1], body(), missing_bytes=1) as connection:
            assert any("anything_in_flight 1.0\n" in ask.get(url + "/metrics").text for _ in range(5000))
            process.terminate()
            if arrives:
                assert any(ask.get(url + "/readyz").json() == {"status": "draining"} for _ in range(5000))
                connection.sendall(b"}")
            answer = b"".join(iter(lambda: connection.recv(1 << 16), b""))
        assert answer.startswith(b"HTTP/1.1 503 ")
        assert b'"code":"draining"' in answer
        assert b"\r\nretry-after: " in answer
        assert process.stdout.readline() == "left 0 0 0 False\n"
        assert process.wait(30) == 0


@pytest.mark.slow
def test_a_client_that_does_not_read_cannot_hold_the_server(
    tmp_path: Path, key_file: tuple[str, str], connect: Callable[..., socket.socket]
) -> None:
    port_file = tmp_path / "port.json"
    command = [sys.executable, "-c", _PROGRAM, key_file[0], "0.1", str(port_file)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.stdin.write("1000000\n")
        process.stdin.flush()
        url = json.loads(port_file.read_text())["url"]
        # The events of so many words are more than the buffers on both sides hold.
        with connect(url, key_file[1], body("a " * 400_000, max_tokens=400_000, stream=True)) as connection:
            assert b" 200 " in connection.recv(20)
            process.terminate()
            assert process.wait(60) == 0


def test_alive_but_not_ready_while_loading(key_file: tuple[str, str], ask: httpx.Client) -> None:
    class Loading(EchoEngine):
        loaded = threading.Event()

        async def start(self) -> None:
            await asyncio.to_thread(self.loaded.wait)

    engine = Loading()
    listener = bind("127.0.0.1", 0)
    server = DrainingServer(create_app(engine, ServeConfig(), load_keys(key_file[0])), listener)
    ready = threading.Event()
    server.on_ready = ready.set
    thread = threading.Thread(target=server.run)
    thread.start()
    url = url_of(listener)
    assert ask.get(url + "/healthz").json() == {"status": "alive"}
    assert (ask.get(url + "/readyz").status_code, ask.get(url + "/readyz").json()) == (503, {"status": "not ready"})
    answer = ask.post(url + PATH, json=body())
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "loading")
    engine.loaded.set()
    assert ready.wait(30)
    assert ask.get(url + "/readyz").json() == {"status": "ready"}
    server.exit_soon()
    thread.join(30)
    assert not thread.is_alive()


def test_answers_are_sent_without_waiting_for_acknowledgements() -> None:
    with bind("127.0.0.1", 0) as listener:
        # What asyncio looks at before it sets TCP_NODELAY on a connection.
        assert listener.proto == socket.IPPROTO_TCP


def test_an_engine_that_cannot_load_ends_the_server_with_its_error(key_file: tuple[str, str]) -> None:
    class Broken(EchoEngine):
        async def start(self) -> None:
            raise UnavailableError("no device", status=503, code="engine_failed")

    server = DrainingServer(create_app(Broken(), ServeConfig(), load_keys(key_file[0])), bind("127.0.0.1", 0))
    with pytest.raises(UnavailableError, match="no device"):
        server.run()


def test_a_port_in_use_and_an_address_of_another_machine_are_refused() -> None:
    with bind("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        assert url_of(listener) == f"http://127.0.0.1:{port}"
        with pytest.raises(PortInUseError, match=rf"port {port} on 127\.0\.0\.1 is in use"):
            bind("127.0.0.1", port)
    # 192.0.2.0/24 is for documentation (RFC 5737): no machine has such an address.
    with pytest.raises(InvalidInputError, match=r"192\.0\.2\.1:0.*--host"):
        bind("192.0.2.1", 0)


def test_a_server_on_every_address_is_asked_on_this_machine() -> None:
    with bind("0.0.0.0", 0) as listener:
        assert url_of(listener) == f"http://127.0.0.1:{listener.getsockname()[1]}"


def test_a_server_whose_engine_is_broken_for_good_ends_with_its_error(key_file: tuple[str, str]) -> None:
    class Broken(EchoEngine):
        async def status(self) -> EngineStatus:
            return EngineStatus(failure="the engine is broken")

    listener = bind("127.0.0.1", 0)
    with listener:
        server = DrainingServer(create_app(Broken(), ServeConfig(port=0), load_keys(key_file[0])), listener)
        with pytest.raises(ServiceError, match="the engine is broken"):
            server.run()
