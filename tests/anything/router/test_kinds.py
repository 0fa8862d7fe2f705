"""A second kind of server, with a dialect of its own: started by a deployment, routed to by the gateway, stopped."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from prefect.logging import disable_run_logger

from anything.keys import read_key_file
from anything.protocol import Chunk, EngineStatus, Generation, UnavailableError, Usage
from anything.router.kinds import DEFAULT_KIND, KINDS, Command, Launch
from anything.router.routing import Router, read_routes
from base import storage
from base.errors import ConfigError, ServiceError
from tasks.deploy import smoke, start
from tasks.overrides import resolve
from tasks.processes.replicas import Server, ServingDirectory, stop_serving
from tasks.release.choice import Release
from tasks.steps import RunContext

# Answers {"say": text, "words": n} with {"said": the text in capitals}; nothing of it is Anything's.
PROGRAM = """
import http.server, json, pathlib, signal, sys
port, secret, model, stopped = int(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4]

class Handler(http.server.BaseHTTPRequestHandler):
    def answer(self, status, value):
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self):
        self.answer(200 if self.path == "/health" else 404, {})

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if self.headers["x-secret"] != pathlib.Path(secret).read_text().strip():
            self.answer(401, {})
        elif model == "mute":
            self.answer(200, {"said": ""})
        else:
            self.answer(200, {"said": " ".join(asked["say"].split()[: asked["words"]]).upper()})

    def log_message(self, *arguments):
        pass

def stop(*arguments):
    pathlib.Path(stopped).write_text("drained")
    sys.exit(0)

signal.signal(signal.SIGINT, stop)
http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


class ShoutEngine:
    """Adapter of the program's dialect to the engine protocol."""

    def __init__(self, url: str, key: str, version: str) -> None:
        self.http = httpx.AsyncClient(base_url=url, headers={"x-secret": key}, trust_env=False)
        self.version = version

    async def start(self) -> None:
        """Nothing to load."""

    async def generate(self, generation: Generation) -> AsyncIterator[Chunk]:
        body = {"say": generation.prompt, "words": generation.sampling.max_tokens}
        try:
            answer = (await self.http.post("/generate", json=body)).raise_for_status()
        except httpx.HTTPError as error:
            raise UnavailableError(str(error), status=502, code="replica_failed") from error
        said = answer.json()["said"]
        yield Chunk(said, self.version, "stop", Usage(len(generation.prompt.split()), len(said.split())))

    async def ready(self) -> bool:
        return (await self.http.get("/health")).is_success

    async def status(self) -> EngineStatus:
        return EngineStatus()

    async def close(self) -> None:
        await self.http.aclose()


class ShoutKind:
    stop_signal = signal.SIGINT

    def __init__(self, directory: Path) -> None:
        self.program, self.stopped = directory / "shout.py", directory / "stopped"
        self.program.write_text(PROGRAM)

    def command(self, launch: Launch) -> Command:
        arguments = (str(launch.port), launch.api_key_file, launch.model_uri, str(self.stopped))
        return Command((sys.executable, str(self.program), *arguments))

    def ready_url(self, launch: Launch) -> str | None:
        url = f"http://127.0.0.1:{launch.port}"
        try:
            return url if httpx.get(url + "/health", trust_env=False).is_success else None
        except httpx.HTTPError:
            return None

    def connect(self, url: str, api_key_file: str, version: str) -> ShoutEngine:
        return ShoutEngine(url, read_key_file(api_key_file), version)


@pytest.fixture
def kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ShoutKind:
    made = ShoutKind(tmp_path)
    monkeypatch.setitem(KINDS, "shout", made)
    return made


@pytest.fixture
def context(kind: ShoutKind, tmp_path: Path) -> Iterator[RunContext]:
    overrides = {"name": "loud", "runs_directory": str(tmp_path), "deploy": {"replica_kind": "shout"}}
    with disable_run_logger():
        yield RunContext(str(tmp_path / "loud"), resolve("configs/tiny.yaml", overrides))
    stop_serving(str(tmp_path))


def test_a_server_of_another_kind_is_deployed_served_behind_the_gateway_and_stopped(
    context: RunContext, kind: ShoutKind, serve: Callable[..., str], ask: httpx.Client
) -> None:
    release = Release("loud", 1, "model")
    replica = start.fn(context, release)
    assert (replica.kind, replica.version) == ("shout", "loud-v1")
    assert start.fn(context, release) == replica, "found running"
    assert smoke.fn(context, release, replica) == context.config.deploy.smoke_prompt.strip().upper()
    serving = ServingDirectory(context.config.runs_directory)
    serving.write_routes({replica.name: 100.0})

    gateway = serve(Router(str(serving.routes)))
    answer = ask.post(gateway + "/v1/anything/infer", json={"prompt": "be loud please", "max_tokens": 2})
    assert answer.json() == {
        "output": "BE LOUD",
        "finish_reason": "stop",
        "model": "loud-v1",
        "usage": {"prompt_tokens": 3, "completion_tokens": 2},
    }
    routes = ask.get(gateway + "/v1/anything/routes").json()
    assert [(r["kind"], r["name"]) for r in routes["replicas"]] == [("shout", "loud-v1")]
    assert routes["versions"]["loud-v1"]["requests"] == 1

    assert stop_serving(context.config.runs_directory) == ["loud-v1"]
    assert kind.stopped.read_text() == "drained", "by its own signal"
    assert not replica.alive


def test_a_server_of_another_kind_that_fails_its_smoke_test_is_stopped(context: RunContext, kind: ShoutKind) -> None:
    release = Release("loud", 2, "mute")
    replica = start.fn(context, release)
    with pytest.raises(ServiceError, match=r"loud-v2 answered the smoke prompt .* with nothing"):
        smoke.fn(context, release, replica)
    assert not replica.alive
    assert ServingDirectory(context.config.runs_directory).servers() == []


def test_records_and_routes_from_before_there_were_kinds_are_embedded(tmp_path: Path) -> None:
    serving = ServingDirectory(str(tmp_path))
    serving.prepare()
    old: dict[str, Any] = {"name": "v1", "pid": 1, "created": 0.0, "url": "http://x", "model": "/m", "version": "v1"}
    storage.write_json(str(serving.path / "server-v1.json"), old)
    assert serving.servers() == [Server(**old)]
    assert (serving.servers()[0].kind, serving.servers()[0].stop_signal) == (DEFAULT_KIND, signal.SIGTERM)
    serving.write_routes({"v1": 100.0})
    # An old gateway that still runs would refuse the key.
    assert "kind" not in json.loads(serving.routes.read_text())["replicas"][0]
    assert read_routes(str(serving.routes)).replicas[0].kind == DEFAULT_KIND


def test_an_unknown_kind_is_refused_with_the_names_there_are(tmp_path: Path, kind: ShoutKind) -> None:
    route = {"name": "a", "version": "1", "url": "http://x", "weight_percent": 100, "api_key_file": "k"}
    (tmp_path / "routes.json").write_text(json.dumps({"replicas": [{**route, "kind": "quiet"}]}))
    with pytest.raises(ConfigError, match=r"replicas\.0\.kind: must be one of embedded, shout \(got 'quiet'\)"):
        read_routes(str(tmp_path / "routes.json"))
    with pytest.raises(ConfigError, match=r"deploy\.replica_kind: must be one of embedded, shout \(got 'quiet'\)"):
        resolve("configs/tiny.yaml", {"deploy": {"replica_kind": "quiet"}})
