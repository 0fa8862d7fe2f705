"""The client against a real server, and every way that asking can fail."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import anything
from anything.client import Client, infer
from anything.protocol import UnavailableError
from anything.router.routing import Router
from anything.serve_config import ServeConfig
from anything.testing import EchoEngine
from base.errors import AuthenticationError, ConfigError, RequestError, ServiceError

Serve = Callable[..., str]


def test_infer_and_stream(serve: Serve, key_file: tuple[str, str]) -> None:
    engine = EchoEngine()
    with Client(serve(engine) + "/", key_file[1]) as client:
        assert client.infer("one two three", max_tokens=2) == "one two "
        assert list(client.stream("one two three", temperature=1.0)) == ["one ", "two ", "three"]
        # Over the limit of an answer in one piece.
        assert client.infer("one two three", max_tokens=5000) == "one two three"
        engine.let(1)
        stream = client.stream("one two three")
        assert next(stream) == "one "
        stream.close()
        assert engine.wait_for("cancelled", 1)


# Words that hold every character at which str.splitlines ends a line; the blanks between them divide the chunks.
LINE_ENDS = " ".join(f"a{end}b" for end in "\0\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029\r\n")


def test_any_character_comes_through_streams_and_a_gateway(
    serve: Serve, key_file: tuple[str, str], tmp_path: Path
) -> None:
    (tmp_path / "key").write_text(key_file[1])
    replica = {"name": "a", "version": "v1", "url": serve(EchoEngine("v1")), "api_key_file": str(tmp_path / "key")}
    (tmp_path / "routes.json").write_text(json.dumps({"replicas": [{**replica, "weight_percent": 100.0}]}))
    gateway = serve(Router(str(tmp_path / "routes.json")))
    for url in (replica["url"], gateway):
        with Client(url, key_file[1]) as client:
            assert client.infer(LINE_ENDS) == LINE_ENDS
            assert "".join(client.stream(LINE_ENDS)) == LINE_ENDS
    with Client(gateway, key_file[1]) as client:
        assert client.routes()["versions"]["v1"]["errors"] == 0


def test_the_module_function_reads_the_environment(
    serve: Serve, key_file: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ANYTHING_URL", serve(EchoEngine()))
    monkeypatch.delenv("ANYTHING_API_KEY", raising=False)
    with pytest.raises(AuthenticationError, match="ANYTHING_API_KEY"):
        infer("a")
    monkeypatch.setenv("ANYTHING_API_KEY", key_file[1])
    assert infer("one two", max_tokens=1) == "one "
    assert anything.infer is infer
    assert anything.Client is Client


def test_errors_say_whose_fault_it_was(serve: Serve, key_file: tuple[str, str]) -> None:
    engine = EchoEngine()
    url = serve(engine, ServeConfig(port=0, timeout_s=0.3))
    with Client(url, "any-wrong") as client:
        for ask in (lambda: client.infer("a"), lambda: list(client.stream("a"))):
            with pytest.raises(AuthenticationError, match="401") as error:
                ask()
            assert error.value.exit_code == 17
        assert "any-wrong" not in repr(client) + str(error.value)
    with Client(url, key_file[1]) as client:
        with pytest.raises(RequestError, match=r"422.*temperature"):
            client.infer("a", temperature=3.0)
        engine._tokens = 1
        with pytest.raises(ServiceError, match=r"504.*within 0.3 s"):
            client.infer("one two")
        engine.let(1)
        with pytest.raises(ServiceError, match=r"broke off.*within 0.3 s"):
            list(client.stream("one two"))
        engine.fail(UnavailableError("lost", status=503, code="engine_failed"))
        with pytest.raises(ServiceError, match=r"503.*lost"):
            client.infer("one two")
    with Client("http://127.0.0.1:9", "k") as client, pytest.raises(ServiceError, match="nothing answers at"):
        client.infer("a")
    with pytest.raises(ConfigError, match="cannot be used"):
        Client("http://127.0.0.1:8080", "clé")


def test_a_proxy_of_the_environment_is_for_other_machines(
    serve: Serve, key_file: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    key = tmp_path / "key"
    key.write_text(key_file[1])
    replica = {"name": "a", "version": "v1", "url": serve(EchoEngine("v1")), "api_key_file": str(key)}
    routes = {"salt": "salt", "replicas": [{**replica, "weight_percent": 100.0}]}
    (tmp_path / "routes.json").write_text(json.dumps(routes))
    with Client(serve(Router(str(tmp_path / "routes.json"))), key_file[1]) as client:
        assert client.infer("one two", max_tokens=1) == "one "
        counted = client.routes()
    assert [(one["version"], one["weight_percent"]) for one in counted["replicas"]] == [("v1", 100.0)]
    assert (counted["versions"]["v1"]["requests"], counted["versions"]["v1"]["errors"]) == (1, 0)


def test_only_a_gateway_has_routes(serve: Serve, key_file: tuple[str, str]) -> None:
    with Client(serve(EchoEngine()), key_file[1]) as client, pytest.raises(RequestError, match=r"404.*--routes"):
        client.routes()


def test_a_stream_that_breaks_off_is_no_answer(breaking_server: str) -> None:
    with Client(breaking_server, "k") as client:
        stream = client.stream("a")
        assert next(stream) == "one "
        with pytest.raises(ServiceError, match="broke off in the middle"):
            next(stream)


@pytest.mark.parametrize(
    "module", ["anything", "anything.client", "anything.http.app", "anything.cli", "anything.testing"]
)
def test_importing_needs_no_torch(module: str) -> None:
    program = (
        f"import sys, {module}; {module}.__dict__; import anything; anything.Client; print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
