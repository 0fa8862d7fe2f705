"""Ending a server: what is in flight finishes or gets a 503, and the process exits with 0."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

PATH = "/v1/anything/infer"


def body(prompt: str = "one two three", **more: object) -> dict[str, object]:
    return {"prompt": prompt, **more}


# Serves an echo that holds until a line on stdin says how many tokens it lets through.
_PROGRAM = """
import sys, threading
from anything.serve_config import ServeConfig
from anything.testing import EchoEngine
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
def test_a_body_that_is_on_its_way_is_told_of_the_drain(
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
