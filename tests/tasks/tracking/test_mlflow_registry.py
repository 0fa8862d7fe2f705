"""MLflow's model registry: logged models of versions, processes that replace each other's champion, and outages."""

from __future__ import annotations

import json
import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from base.errors import OperationalError
from tasks.code_version import CodeVersion
from tasks.run_config import TrackingConfig
from tasks.tracking import mlflow_claim
from tasks.tracking.mlflow_tracker import MlflowTracker

pytestmark = pytest.mark.slow
_CODE = CodeVersion("9.9", "d" * 64, None)
# A run's end, in a process of its own: compare with the champion, replace it if better, and again if it has changed.
_COMPETE = """
import json, sys
from tasks.code_version import CodeVersion
from tasks.run_config import TrackingConfig
from tasks.tracking import mlflow_claim
from tasks.tracking.mlflow_tracker import MlflowTracker

uri, folder, name, number, losses = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]), json.loads(sys.argv[5])
registry = MlflowTracker(TrackingConfig(uri=uri), folder, CodeVersion("9.9", "d" * 64, None)).registry
seen = registry.version(name, alias="champion")  # None; connected from here on
print("ready", flush=True)
sys.stdin.readline()
while seen is None or losses[str(number)] < losses[str(seen)]:
    if registry.set_alias(name, "champion", number, replacing=seen):
        break
    champion = registry.version(name, alias="champion")
    seen = champion and champion.version
"""


def test_a_version_is_a_logged_model_that_shows_where_it_is_registered(tracker: MlflowTracker) -> None:
    made = tracker.runs.start("made", parent=None, step="register", identity="f", run_key="k")
    version = tracker.registry.register(made, "linked", "/runs/a/export", identity="i", alias="candidate", tags={})
    assert version.model_id is not None and "models:/" not in version.model_id
    model = tracker._connection.get()[0].get_logged_model(version.model_id)
    assert '"linked"' in model.tags["mlflow.modelVersions"]


@pytest.fixture(scope="module")
def server(tracker: MlflowTracker) -> Iterator[str]:
    """Address of an MLflow server on the tracker's own database."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", tracker.address, "--workers", "1"]
    environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    with subprocess.Popen(
        [*command, "--port", str(port)], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        try:
            while not _answers(f"http://127.0.0.1:{port}/health"):
                assert process.poll() is None
                time.sleep(0.1)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()


def _answers(url: str) -> bool:
    try:
        return httpx.get(url, trust_env=False).is_success
    except httpx.HTTPError:
        return False


def test_an_alias_is_the_first_thing_that_a_connection_changes(tracker: MlflowTracker, tmp_path: Path) -> None:
    tracker.registry.register(None, "first-call", "/a", identity="first-call", alias="candidate", tags={})
    fresh = MlflowTracker(TrackingConfig(uri=tracker.address), str(tmp_path), _CODE)
    assert fresh.registry.set_alias("first-call", "champion", 1, replacing=None)


def test_a_process_of_the_database_waits_for_a_claim_that_came_by_a_server(
    tracker: MlflowTracker, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry, (client, _) = tracker.registry, tracker._connection.get()
    for number in (1, 2):
        registry.register(None, "waits", f"/{number}", identity=f"waits-{number}", alias="candidate", tags={})
    client.set_registered_model_tag("waits", "cherry.claim.champion", "another")

    def the_other_ends(_: float) -> None:
        client.set_registered_model_alias("waits", "champion", "1")
        client.delete_registered_model_tag("waits", "cherry.claim.champion")
        monkeypatch.undo()

    monkeypatch.setattr(mlflow_claim.time, "sleep", the_other_ends)
    assert not registry.set_alias("waits", "champion", 2, replacing=None)


@pytest.mark.parametrize("through", ["database", "server", "both"])
def test_processes_that_end_at_once_never_leave_a_worse_champion(
    tracker: MlflowTracker, server: str, tmp_path: Path, through: str
) -> None:
    """In whatever order they come, and whatever each of them had compared with."""
    registry, name = tracker.registry, f"overlap-{through}"
    uris = {"database": [tracker.address], "server": [server], "both": [tracker.address, server]}[through]
    numbers = list(range(1, 7))
    losses = dict(zip(numbers, random.Random(through).sample([1.0, 1.5, 2.0, 2.5, 3.0, 3.5], 6), strict=True))
    for number in numbers:
        registry.register(None, name, f"/{number}", identity=f"{name}-{number}", alias="candidate", tags={})
    running = []
    for number in numbers:
        given = [uris[number % len(uris)], str(tmp_path), name, str(number), json.dumps(losses)]
        command = [sys.executable, "-W", "ignore", "-c", _COMPETE, *given]
        running.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
    for process in running:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
    for process in running:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    for process in running:
        process.communicate()
        assert process.returncode == 0
    champion = registry.version(name, alias="champion")
    assert champion is not None and losses[champion.version] == min(losses.values())
    while (before := champion.tags.get("previous_champion")) is not None:
        assert losses[int(before)] > losses[champion.version]
        champion = registry.version(name, number=int(before))
        assert champion is not None


def test_an_outage_of_the_registry_says_what_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    down = MlflowTracker(TrackingConfig(uri="http://127.0.0.1:9"), str(tmp_path), _CODE)
    with pytest.raises(OperationalError, match="registry could not version"):
        down.registry.version("net", alias="champion")
