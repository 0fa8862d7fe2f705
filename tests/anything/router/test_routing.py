"""Weights, sticky subjects, retries and reloads, over a real gateway in front of real replicas."""

from __future__ import annotations

import json
import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from anything.protocol import GenerationError, UnavailableError
from anything.router.routing import ReplicaRoute, Router, Routes, read_routes
from anything.serve_config import ServeConfig
from anything.testing import EchoEngine
from base.errors import ConfigError, MissingFileError

Serve = Callable[..., str]
PATH = "/v1/anything/infer"
FAILED = UnavailableError("the device is lost", status=503, code="engine_down")


def routes(**weights: float) -> Routes:
    replicas = [
        ReplicaRoute(name=name, version=name, url="http://x", weight_percent=weight, api_key_file="k")
        for name, weight in weights.items()
    ]
    return Routes(salt="salt", replicas=tuple(replicas))


def test_many_subjects_follow_the_weights() -> None:
    table = routes(a=70, b=25, c=5, d=0)
    count = Counter(table.ranked(f"subject-{i}")[0].name for i in range(4000))
    # Four standard deviations of a binomial share at most.
    assert abs(count["a"] - 2800) < 4 * (4000 * 0.7 * 0.3) ** 0.5
    assert abs(count["b"] - 1000) < 4 * (4000 * 0.25 * 0.75) ** 0.5
    assert abs(count["c"] - 200) < 4 * (4000 * 0.05 * 0.95) ** 0.5
    assert count["d"] == 0


def test_a_shift_moves_subjects_to_the_new_version_only() -> None:
    steps = [routes(old=95, new=5), routes(old=75, new=25), routes(old=50, new=50), routes(new=100, old=0)]
    moved: set[str] = set()
    for step in steps:
        now = {f"s{i}" for i in range(500) if step.ranked(f"s{i}")[0].name == "new"}
        assert moved < now
        moved = now
    assert len(moved) == 500


def test_another_salt_deals_anew() -> None:
    one, two = (routes(a=50, b=50).model_copy(update={"salt": salt}) for salt in ("1", "2"))
    same = sum(one.ranked(f"s{i}")[0] == two.ranked(f"s{i}")[0] for i in range(1000))
    assert 400 < same < 600


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "JSON"),
        ("[]", "object"),
        ('{"replicas": []}', "100 percent"),
        ('{"replica": []}', "did you mean replicas"),
        (
            '{"replicas": [{"name": "a", "version": "1", "url": "x", "weight_percent": 101, "api_key_file": "k"}]}',
            "replicas.0.weight_percent",
        ),
    ],
)
def test_wrong_routes_say_what_is_wrong(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "routes.json"
    path.write_text(content)
    with pytest.raises(ConfigError, match=message):
        read_routes(str(path))
    with pytest.raises(MissingFileError, match="no routes at"):
        read_routes(str(tmp_path / "other.json"))


class Fleet:
    """Two replicas and a gateway in front of them."""

    def __init__(self, serve: Serve, key_file: tuple[str, str], directory: Path) -> None:
        self.engines = {"old": EchoEngine("ignored"), "new": EchoEngine("ignored")}
        self.path = directory / "routes.json"
        self.key = directory / "replica.key"
        self.key.write_text(key_file[1] + "\n")
        self.urls = {name: serve(engine) for name, engine in self.engines.items()}
        self.shift(old=100, new=0)
        self.url = serve(Router(str(self.path)), ServeConfig(port=0, timeout_s=30))
        self.http = httpx.Client(headers={"authorization": f"Bearer {key_file[1]}"}, timeout=60, trust_env=False)

    def shift(self, **weights: float) -> None:
        replicas = [
            {
                "name": name,
                "version": name,
                "url": self.urls[name],
                "weight_percent": weight,
                "api_key_file": str(self.key),
            }
            for name, weight in weights.items()
        ]
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(json.dumps({"salt": "s", "replicas": replicas}))
        temporary.replace(self.path)

    def ask(self, subject: str | None = None, **body: object) -> httpx.Response:
        headers = {} if subject is None else {"x-subject": subject}
        return self.http.post(self.url + PATH, json={"prompt": "one two three", **body}, headers=headers)

    def counters(self) -> dict[str, dict[str, object]]:
        answer: dict[str, dict[str, object]] = self.http.get(self.url + "/v1/anything/routes").json()["versions"]
        return answer


@pytest.fixture
def fleet(serve: Serve, key_file: tuple[str, str], tmp_path: Path) -> Iterator[Fleet]:
    fleet = Fleet(serve, key_file, tmp_path)
    with fleet.http:
        yield fleet


def test_traffic_follows_the_file_and_subjects_stay(fleet: Fleet) -> None:
    subjects = [f"user-{i}" for i in range(40)]
    assert {fleet.ask(subject).headers["x-anything-version"] for subject in subjects} == {"old"}
    fleet.shift(old=50, new=50)
    first = {subject: fleet.ask(subject).headers["x-anything-version"] for subject in subjects}
    assert 8 <= Counter(first.values())["new"] <= 32
    assert {subject: fleet.ask(subject).headers["x-anything-version"] for subject in subjects} == first
    # Without a subject, the key and the prompt decide.
    assert len({fleet.ask().headers["x-anything-version"] for _ in range(5)}) == 1
    assert len({fleet.ask(prompt=f"prompt {i}").headers["x-anything-version"] for i in range(20)}) == 2
    fleet.shift(new=100)
    answer = fleet.ask("user-1")
    assert answer.headers["x-anything-version"] == "new"
    assert answer.json() == {
        "output": "one two three",
        "finish_reason": "stop",
        "model": "new",
        "usage": {"prompt_tokens": 3, "completion_tokens": 3},
    }
    assert fleet.engines["old"].started + fleet.engines["new"].started == 40 + 80 + 25 + 1


def test_routes_are_told_with_counters_for_each_version(fleet: Fleet) -> None:
    for index in range(10):
        fleet.ask(f"user-{index}")
    answer = fleet.http.get(fleet.url + "/v1/anything/routes").json()
    assert [(r["name"], r["weight_percent"]) for r in answer["replicas"]] == [("old", 100.0), ("new", 0.0)]
    assert str(fleet.key) not in json.dumps(answer)
    old = answer["versions"]["old"]
    assert (old["requests"], old["errors"], old["cancelled"]) == (10, 0, 0)
    assert 0 < old["latency_s"]["p50"] <= old["latency_s"]["p95"] <= old["latency_s"]["p99"]
    assert httpx.get(fleet.url + "/v1/anything/routes", trust_env=False).status_code == 401
    assert fleet.http.get(fleet.urls["old"] + "/v1/anything/routes").status_code == 404
    assert 'anything_version_requests_total{version="old"} 10' in fleet.http.get(fleet.url + "/metrics").text


@pytest.mark.parametrize("stream", [False, True])
def test_a_replica_that_fails_at_once_is_asked_elsewhere(stream: bool, fleet: Fleet) -> None:
    fleet.shift(old=50, new=50)
    subject = next(s for s in map(str, range(99)) if fleet.ask(s).headers["x-anything-version"] == "new")
    before = fleet.counters()
    fleet.engines["new"].fail(FAILED)
    answer = fleet.ask(subject, stream=stream)
    assert (answer.status_code, answer.headers["x-anything-version"]) == (200, "old")
    assert "three" in answer.text
    after = fleet.counters()
    assert after["new"]["errors"] == before["new"]["errors"] + 1  # type: ignore[operator]
    assert after["old"]["errors"] == 0
    fleet.engines["old"].fail(FAILED)
    both = fleet.ask(subject, stream=stream)
    assert both.status_code == 503
    assert fleet.http.get(fleet.url + "/readyz").status_code == 503
    fleet.engines["new"].fail(None)
    assert fleet.http.get(fleet.url + "/readyz").status_code == 200


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("failure", "status", "code"),
    [
        (GenerationError("the output is not a number"), 500, "generation_failed"),
        # The engine failed with the request in it, and does not say that it was not the request.
        (UnavailableError("the engine failed", status=503, code="engine_failed"), 503, "engine_failed"),
    ],
)
def test_a_request_that_breaks_a_replica_is_not_handed_to_the_next(
    failure: UnavailableError, status: int, code: str, stream: bool, fleet: Fleet
) -> None:
    fleet.shift(old=50, new=50)
    subject = next(s for s in map(str, range(99)) if fleet.ask(s).headers["x-anything-version"] == "new")
    before, asked = fleet.counters(), fleet.engines["old"].started
    fleet.engines["new"].fail(failure)
    answer = fleet.ask(subject, stream=stream)
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
    after = fleet.counters()
    assert fleet.engines["old"].started == asked
    assert after["new"]["errors"] == before["new"]["errors"] + 1  # type: ignore[operator]
    assert str(failure) in str(after["new"]["last_error"])
    assert after.get("old", {"errors": 0})["errors"] == 0


STREAMED = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n"


@pytest.mark.parametrize(
    ("sent", "reason"),
    [
        (b"HTTP/1.1 204 No Content\r\n\r\n", "answered 204"),
        (b"HTTP/1.1 302 Found\r\nlocation: /x\r\ncontent-length: 0\r\n\r\n", "answered 302"),
        (b"HTTP/1.1 500 Oh\r\ncontent-length: 4\r\n\r\noops", "answered 500"),
        (b"HTTP/1.1 503 Oh\r\ncontent-length: 4\r\n\r\noops", "answered 503"),
        (b'HTTP/1.1 502 Oh\r\ncontent-length: 12\r\n\r\n{"error": []}', "answered 502"),
        (b"no HTTP\r\n\r\n", "RemoteProtocolError"),
        (STREAMED + b"<html>\n\n", "broke off"),
        (STREAMED + b"data: {\n\n", "not JSON"),
        (STREAMED + b"data: []\n\n", "not a JSON object"),
        (STREAMED + b'data: {"txt": "a"}\n\n', "missing or wrong field: text"),
        (STREAMED + b'data: {"text": 5}\n\n', "missing or wrong field: text"),
        (STREAMED + b'data: {"text": "a", "finish_reason": "tired"}\n\n', "wrong field: finish_reason"),
        (STREAMED + b'data: {"text": "a", "usage": {}}\n\n', "usage"),
        (STREAMED + b'data: {"error": "lost"}\n\n', "lost"),
        (STREAMED + b'data: {"error": {"code": "x", "message": "lost"}}\n\n', "lost"),
        (STREAMED + b'data: {"text": "a", "finish_reason": "stop"}\n\n', "broke off"),
    ],
)
def test_whatever_a_replica_breaks_is_counted_for_its_version_with_the_reason(
    sent: bytes, reason: str, fleet: Fleet
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            for _ in range(2):
                connection, _ = listener.accept()
                with connection, connection.makefile("rb") as received:
                    length = 0
                    while (line := received.readline()) != b"\r\n":
                        length = int(line.split(b":")[1]) if line.lower().startswith(b"content-length") else length
                    received.read(length)
                    connection.sendall(sent)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        fleet.urls["new"] = f"http://127.0.0.1:{listener.getsockname()[1]}"
        fleet.shift(new=100)
        for stream in (False, True):
            answer = fleet.ask("a", stream=stream)
            assert answer.status_code in (500, 502, 503)
            assert set(answer.json()["error"]) == {"code", "message"}
        thread.join(30)
    counted = fleet.counters()["new"]
    assert (counted["requests"], counted["errors"]) == (2, 2)
    assert reason in str(counted["last_error"])


def test_a_replica_without_weight_is_no_fallback(fleet: Fleet) -> None:
    fleet.engines["old"].fail(FAILED)
    assert fleet.ask("a").status_code == 503
    assert fleet.engines["new"].started == 0


def test_nothing_is_asked_twice_after_the_first_byte(fleet: Fleet) -> None:
    fleet.shift(old=50, new=50)
    for engine in fleet.engines.values():
        engine.let(None)
    subject = next(s for s in map(str, range(99)) if fleet.ask(s).headers["x-anything-version"] == "new")
    asked = fleet.engines["old"].started
    fleet.engines["new"]._tokens = 1
    with fleet.http.stream(
        "POST", fleet.url + PATH, json={"prompt": "one two", "stream": True}, headers={"x-subject": subject}
    ) as answer:
        lines = (line for line in answer.iter_lines() if line)
        assert "one" in next(lines)
        fleet.engines["new"].fail(FAILED)
        rest = list(lines)
    assert len(rest) == 1
    assert "replica_failed" in rest[0]
    assert fleet.engines["old"].started == asked


def test_a_dead_replica_and_a_wrong_key_are_502(fleet: Fleet, tmp_path: Path) -> None:
    fleet.urls["new"] = "http://127.0.0.1:9"
    fleet.shift(new=100)
    dead = fleet.ask("a")
    assert (dead.status_code, dead.json()["error"]["code"]) == (502, "unreachable")
    fleet.shift(old=50, new=50)
    assert {fleet.ask(str(i)).headers["x-anything-version"] for i in range(8)} == {"old"}
    fleet.key = tmp_path / "other.key"
    fleet.key.write_text("any-wrong")
    fleet.shift(old=100)
    refused = fleet.ask("a")
    assert refused.status_code == 502
    assert "any-wrong" not in refused.text


def test_a_replica_that_breaks_off_is_502_or_an_error_event(fleet: Fleet, breaking_server: str) -> None:
    fleet.urls["new"] = breaking_server
    fleet.shift(new=100)
    whole = fleet.ask("a")
    assert (whole.status_code, whole.json()["error"]["code"]) == (502, "replica_failed")
    stream = fleet.ask("a", stream=True)
    assert (stream.status_code, "[DONE]" in stream.text, "broke off" in stream.text) == (200, False, True)
    assert (fleet.counters()["new"]["requests"], fleet.counters()["new"]["errors"]) == (2, 2)


def test_what_the_replica_refuses_is_told_and_no_error_of_the_version(fleet: Fleet) -> None:
    fleet.engines["old"]._limit = 0
    busy = fleet.ask("a")
    assert (busy.status_code, busy.headers["retry-after"]) == (429, "1")
    assert fleet.counters()["old"]["errors"] == 0


def test_a_wrong_file_keeps_the_routes_and_is_told(fleet: Fleet) -> None:
    fleet.path.write_text('{"replicas": "none"}')
    assert fleet.ask("a").headers["x-anything-version"] == "old"
    assert "replicas" in fleet.http.get(fleet.url + "/v1/anything/routes").json()["rejected"]
    fleet.path.unlink()
    assert fleet.ask("a").status_code == 200
    fleet.shift(new=100)
    assert fleet.ask("a").headers["x-anything-version"] == "new"
    assert fleet.http.get(fleet.url + "/v1/anything/routes").json()["rejected"] is None


def test_an_answer_in_flight_survives_the_removal_of_its_replica(fleet: Fleet) -> None:
    fleet.engines["old"]._tokens = 1
    with fleet.http.stream("POST", fleet.url + PATH, json={"prompt": "one two", "stream": True}) as answer:
        lines = (line for line in answer.iter_lines() if line)
        assert "one" in next(lines)
        fleet.shift(new=100)
        assert fleet.ask("a").headers["x-anything-version"] == "new"
        fleet.engines["old"].let(None)
        assert list(lines)[-1] == "data: [DONE]"


@pytest.mark.parametrize("stream", [False, True])
def test_a_disconnect_reaches_the_replica(stream: bool, fleet: Fleet) -> None:
    engine = fleet.engines["old"]
    engine._tokens = 1
    with (
        httpx.Client(headers=fleet.http.headers, timeout=0.5, trust_env=False) as impatient,
        pytest.raises(httpx.ReadTimeout),
    ):
        impatient.post(fleet.url + PATH, json={"prompt": "one two", "stream": stream})
    assert engine.wait_for("cancelled", 1)
    assert fleet.counters()["old"]["errors"] == 0


def test_a_slow_replica_is_an_error_of_its_version(serve: Serve, fleet: Fleet, key_file: tuple[str, str]) -> None:
    fleet.engines["old"]._tokens = 0
    url = serve(Router(str(fleet.path)), ServeConfig(port=0, timeout_s=0.3))
    assert fleet.http.post(url + PATH, json={"prompt": "one"}).status_code == 504
    assert fleet.engines["old"].wait_for("cancelled", 1)
    versions = fleet.http.get(url + "/v1/anything/routes").json()["versions"]
    assert (versions["old"]["errors"], versions["old"]["cancelled"]) == (1, 0)
