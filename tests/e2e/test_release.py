"""Releases of two versions of real weights: traffic in steps, a breach that puts it back, and the end of serving."""

import json
import os
import signal
from pathlib import Path

import pytest
from prefect.logging import disable_run_logger

from anything.client import Client
from anything.keys import read_key_file
from base.errors import ServiceError
from tasks.deploy import shift, start
from tasks.overrides import resolve
from tasks.processes.replicas import ServingDirectory, stop_serving
from tasks.release.choice import Release
from tasks.steps import RunContext

pytestmark = pytest.mark.slow


def deploy(project, run, *overrides):
    (version,) = project.versions(run)
    ended = project.cherry("deploy", f"name={run}", *overrides, "--model-version", str(version.version))
    return ended, json.loads((project.runs / run / "deploy.json").read_text()) if ended.returncode == 0 else {}


def gateway(project):
    """URL and key of the running gateway."""
    serving = ServingDirectory(str(project.runs))
    return serving.find("gateway").url, read_key_file(str(serving.client_key))


def shares(project):
    with Client(*gateway(project)) as client:
        return {one["version"]: one["weight_percent"] for one in client.routes()["replicas"]}


@pytest.fixture(scope="module")
def first_release(project, finished, second):
    ended, state = deploy(project, "first")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return state


def test_the_first_release_gets_all_traffic_and_answers(project, first_release):
    label = first_release["release"]
    assert [row["percent"] for row in first_release["steps"]] == [100]
    told = map(json.loads, (project.runs / "first" / "events.jsonl").read_text().splitlines())
    events = [one["event"] for one in told if one["step"] == "deploy"]
    assert (events[0], events[-1], events.count("started")) == ("started", "finished", 1)
    assert "seconds/deploy" in project.mlflow_runs("first")["flow"].data.metrics
    assert shares(project) == {label: 100.0}
    with Client(*gateway(project)) as client:
        assert client.infer("the model ", max_tokens=8)


def test_a_replica_that_fails_its_smoke_test_gets_no_traffic(project, first_release):
    ended, _ = deploy(project, "second", "serve.timeout_s=0.0001")
    assert ended.returncode == ServiceError.exit_code, ended.stdout + ended.stderr
    assert "Traceback" not in ended.stderr
    failed = project.mlflow_runs("second")["deploy"]
    assert failed.info.status == "FAILED"
    assert ended.stderr.splitlines()[-1].removeprefix("error: ") in failed.data.tags["mlflow.note.content"]
    assert shares(project) == {first_release["release"]: 100.0}
    assert [one.name for one in ServingDirectory(str(project.runs)).servers()] == ["gateway", first_release["release"]]


def test_a_breach_puts_the_traffic_back(project, first_release):
    context = RunContext(str(project.runs / "first"), resolve(project.config, {}))
    with disable_run_logger():
        release = Release("pipeline", 99, str(project.runs / "second" / "quantized"))
        replica = start.fn(context, release)
        os.kill(replica.pid, signal.SIGKILL)
        with pytest.raises(ServiceError, match=r"failed at 25 % of traffic .*; traffic was rolled back"):
            shift.fn(context, release, replica)
    assert shares(project) == {first_release["release"]: 100.0}
    assert ServingDirectory(str(project.runs)).find(replica.name) is None
    with Client(*gateway(project)) as client:
        assert client.infer("the model ", max_tokens=8)


def test_the_second_release_takes_over_in_steps_and_ends_the_first(project, first_release):
    ended, state = deploy(project, "second")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert [(row["percent"], row["errors"]) for row in state["steps"]] == [(25, 0), (100, 0)]
    assert all(row["requests"] >= 8 for row in state["steps"])
    assert state["replaced"] == [first_release["release"]]
    assert shares(project) == {state["release"]: 100.0}
    assert [one.name for one in ServingDirectory(str(project.runs)).servers()] == ["gateway", state["release"]]
    serving = project.mlflow.get_model_version_by_alias("pipeline", "serving")
    assert serving.version == project.versions("second")[0].version
    assert serving.tags["previous_serving"] == str(project.versions("first")[0].version)
    released = project.mlflow_runs("second")["deploy"]
    assert released.info.status == "FINISHED"
    assert [one.path for one in project.mlflow.list_artifacts(released.info.run_id)] == [
        "deploy.json",
        "release_steps.csv",
    ]
    for line in ("replaces pipeline v", "25 % of traffic on pipeline-v", "100 % of traffic on pipeline-v"):
        assert f"deploy: {line}" in ended.stdout


def test_stopping_ends_every_server(project, first_release):
    serving = ServingDirectory(str(project.runs))
    pids = [one.pid for one in serving.servers()]
    assert len(stop_serving(str(project.runs))) == 2
    assert serving.servers() == []
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]
    assert stop_serving(str(project.runs)) == []
