"""A project as a person has it: a real Prefect server, a process worker, the deployments, and one finished run."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest

from tests.project import Project, answers, end, free_port, kill, running_project, wait_for


@pytest.fixture(scope="session")
def project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    """A project with a Prefect server, set up by `cherry setup`."""
    with running_project(tmp_path_factory.mktemp("project")) as made:
        yield made


@pytest.fixture(scope="session")
def worker(project: Project) -> Iterator[None]:
    """A process worker that takes runs from the pool."""
    running = project.start("prefect", "worker", "start", "--pool", "cherry", log="worker")
    yield
    end(running)


@pytest.fixture(scope="session")
def finished(project: Project, worker: None) -> dict[str, Any]:
    """The summary of a run that a deployment made, by way of the worker."""
    run = project.run_deployment("train-flow/train-tiny")
    assert project.end_of(run) == "COMPLETED", (project.home / "worker.log").read_text()[-4000:]
    summary = json.loads((project.runs / "first" / "summary.json").read_text())
    return {**summary, "flow_run_id": run}


@pytest.fixture(scope="session")
def second(project: Project, finished: dict[str, Any]) -> dict[str, Any]:
    """The summary of a worse run, whose MLflow server is killed while it trains and started again after."""
    port = free_port()
    uri = f"http://127.0.0.1:{port}"
    arguments = ["--backend-store-uri", f"sqlite:///{project.runs}/mlflow.db", "--port", str(port), "--workers", "1"]

    def tracking_server() -> subprocess.Popen[bytes]:
        return project.start("mlflow", "server", *arguments, log="mlflow")

    server = tracking_server()
    try:
        wait_for(lambda: answers(f"{uri}/health"), "the MLflow server")
        overrides = ["name=second", "train.learning_rate=1e-4", f"tracking.uri={uri}"]
        running = project.start("flows.cli", "run", project.config, *overrides, log="second")
        wait_for(lambda: len(project.metrics("second")) > 5, "training")
        kill(server)
        at_the_outage = len(project.metrics("second"))
        wait_for((project.runs / "second" / "steps" / "train.json").exists, "the end of the train step")
        assert not answers(f"{uri}/health")
        server = tracking_server()
        assert running.wait() == 0, (project.home / "second.log").read_text()[-4000:]
    finally:
        kill(server)
    summary = json.loads((project.runs / "second" / "summary.json").read_text())
    return {**summary, "at_the_outage": at_the_outage}
