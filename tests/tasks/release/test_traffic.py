"""Traffic of a release, by a real gateway over servers whose engine can be broken: steps, breach, rollback, history."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from prefect.logging import disable_run_logger

from anything.protocol import UnavailableError
from anything.testing import EchoEngine
from base import storage
from base.config import dump
from base.errors import ServiceError
from tasks.lifecycle import RELEASE_CONFIG
from tasks.overrides import resolve
from tasks.processes.replicas import GATEWAY, Server, ServingDirectory, stop_serving
from tasks.release.choice import Release
from tasks.release.traffic import HISTORY_FILE, shift_traffic
from tasks.steps import RunContext
from tests.anything.conftest import serving as serving_thread

pytestmark = pytest.mark.slow
OLD, NEW = Release("net", 1, "/weights/1"), Release("net", 2, "/weights/2")


@pytest.fixture
def context(tmp_path: Path) -> Iterator[RunContext]:
    """A run in whose runs directory servers can be started, tracked in JSON files."""
    overrides = {
        "name": "net",
        "runs_directory": str(tmp_path),
        "tracking": {"uri": "json:"},
        "serve": {"port": 0},
        "deploy": {"requests_per_step": 4},
    }
    made = RunContext(str(tmp_path / "net"), resolve("configs/tiny.yaml", overrides))
    storage.write_bytes(str(made.path / RELEASE_CONFIG), dump(made.config).encode())
    ServingDirectory(str(tmp_path)).prepare()
    with disable_run_logger():
        yield made
    stop_serving(str(tmp_path))


@pytest.fixture
def serve(context: RunContext) -> Iterator[Callable[[Release], tuple[Server, EchoEngine]]]:
    """Starts a server of a release: it answers from a thread, and its record names a process that may be ended."""
    directory = ServingDirectory(context.config.runs_directory)
    with ExitStack() as stack:

        def start(release: Release) -> tuple[Server, EchoEngine]:
            engine = EchoEngine(release.label)
            url = stack.enter_context(serving_thread(engine, str(directory.internal_keys)))
            process = stack.enter_context(subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE))
            created = psutil.Process(process.pid).create_time()
            server = Server(release.label, process.pid, created, url, release.model_path, release.label)
            storage.write_json(str(directory.path / f"server-{server.name}.json"), vars(server))
            return server, engine

        yield start


@pytest.fixture
def served(context: RunContext, serve: Callable[[Release], tuple[Server, EchoEngine]]) -> EchoEngine:
    """The engine of an old version that has all traffic, through the gateway."""
    server, engine = serve(OLD)
    shift_traffic(context, OLD, server)
    return engine


def shares(context: RunContext) -> dict[str, float]:
    return ServingDirectory(context.config.runs_directory).weights()


def history(context: RunContext) -> list[dict[str, str]]:
    with (context.path / HISTORY_FILE).open(newline="") as handle:
        return list(csv.DictReader(handle))


def tracked(context: RunContext) -> Release:
    """The new release with a run of its own in the tracker."""
    runs = context.tracker().runs
    run_id = runs.start("net-deploy", parent=None, step="deploy", identity="i", run_key="k")
    return replace(NEW, run_id=run_id)


def lasting_lines(context: RunContext) -> list[str]:
    events = map(json.loads, (context.path / "events.jsonl").read_text().splitlines())
    return [event["line"] for event in events if event.get("lasting")]


def test_traffic_moves_in_steps_and_leaves_its_history(
    context: RunContext, serve: Callable[..., Any], served: EchoEngine
) -> None:
    replica, engine = serve(NEW)
    release = tracked(context)
    shifted = shift_traffic(context, release, replica)
    assert shares(context) == {OLD.label: 0.0, NEW.label: 100.0}
    assert [(step["percent"], step["errors"], step["outcome"]) for step in shifted["steps"]] == [
        (25, 0, "went on"),
        (100, 0, "went on"),
    ]
    assert shifted["replaced"] == [OLD.label]
    assert engine.finished == sum(step["requests"] for step in shifted["steps"])
    assert [(row["percent"], row["requests"]) for row in history(context)] == [("25", "4"), ("100", "4")]
    folder = Path(context.config.runs_directory) / "tracking" / "runs" / str(release.run_id)
    assert (folder / HISTORY_FILE).read_bytes() == (context.path / HISTORY_FILE).read_bytes()
    points = [json.loads(line) for line in folder.with_suffix(".jsonl").read_text().splitlines()]
    by_name = {(point["name"], point["step"]): point["value"] for point in points}
    assert by_name[("release/requests", 25)] == by_name[("release/requests", 100)] == 4
    assert lasting_lines(context)[-2:] == [
        "25 % of traffic on net-v2: 0 of 4 requests failed",
        "100 % of traffic on net-v2: 0 of 4 requests failed",
    ]


def test_a_gateway_whose_routes_were_moved_is_replaced(
    context: RunContext, serve: Callable[..., Any], served: EchoEngine
) -> None:
    """As after `mv runs elsewhere`: it would never see another change of the routes."""
    directory = ServingDirectory(context.config.runs_directory)
    old = directory.find(GATEWAY)
    assert old is not None and old.model == str(directory.routes)
    storage.write_json(str(directory.path / f"server-{GATEWAY}.json"), vars(replace(old, model="/gone/routes.json")))
    replica, _ = serve(NEW)
    shift_traffic(context, tracked(context), replica)
    new = directory.find(GATEWAY)
    assert new is not None and new.pid != old.pid
    assert not old.alive
    assert shares(context)[NEW.label] == 100.0


def test_a_breach_is_rolled_back_with_the_first_error_as_its_reason(
    context: RunContext, serve: Callable[..., Any], served: EchoEngine
) -> None:
    replica, engine = serve(NEW)
    engine.fail(UnavailableError("the echo is hoarse", status=500, code="generation_failed"))
    breach = r"net-v2: 4 of 4 requests failed at 25 % of traffic .*rolled back\. The first: .*the echo is hoarse"
    with pytest.raises(ServiceError, match=breach):
        shift_traffic(context, tracked(context), replica)
    assert shares(context) == {OLD.label: 100.0}
    assert not replica.alive
    assert [(row["percent"], row["errors"], row["outcome"]) for row in history(context)] == [("25", "4", "rolled back")]
    assert "the echo is hoarse" in history(context)[0]["reason"]
    assert "4 of 4 requests failed: " in lasting_lines(context)[-1]
    assert "the echo is hoarse" in lasting_lines(context)[-1]


def test_what_the_old_version_fails_is_not_the_new_ones_fault(
    context: RunContext, serve: Callable[..., Any], served: EchoEngine
) -> None:
    served.fail(UnavailableError("the old echo is hoarse", status=500, code="generation_failed"))
    replica, _ = serve(NEW)
    shifted = shift_traffic(context, tracked(context), replica)
    assert [step["errors"] for step in shifted["steps"]] == [0, 0]
    assert shares(context)[NEW.label] == 100.0


def test_a_version_that_no_request_reaches_is_no_success(
    context: RunContext, serve: Callable[..., Any], served: EchoEngine
) -> None:
    replica, engine = serve(NEW)
    nowhere = replace(replica, url="ftp://127.0.0.1")  # which the gateway refuses, and keeps the routes that it has
    storage.write_json(str(ServingDirectory(context.config.runs_directory).path / "server-net-v2.json"), vars(nowhere))
    with pytest.raises(ServiceError, match=r"net-v2: 0 requests reached it at 25 % .*requests_per_step asks for 4"):
        shift_traffic(context, tracked(context), nowhere)
    assert engine.started == 0
    assert shares(context) == {OLD.label: 100.0}


def test_a_first_release_that_fails_leaves_no_gateway(context: RunContext, serve: Callable[..., Any]) -> None:
    replica, engine = serve(NEW)
    engine.fail(UnavailableError("the echo is hoarse", status=500, code="generation_failed"))
    with pytest.raises(ServiceError, match="at 100 % of traffic"):
        shift_traffic(context, tracked(context), replica)
    directory = ServingDirectory(context.config.runs_directory)
    assert directory.servers() == []
    assert not directory.routes.exists()
    assert directory.find(GATEWAY) is None
