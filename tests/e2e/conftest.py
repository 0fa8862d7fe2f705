"""A project as a person has it: a real Prefect server, a process worker, the deployments, and one finished run."""

from __future__ import annotations

import json
import os
import random
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from mlflow import MlflowClient

ROOT = Path(__file__).resolve().parents[2]
DEADLINE_S = 240.0
STEPS = ("provision", "data", "train", "export", "quantize", "evaluate", "register", "deploy")
_CONFIG = """\
name: first
runs_directory: {runs}
model: {{preset: tiny, vocab_size: 512, hidden_size: 32, intermediate_size: 64, moe_intermediate_size: 32,
        num_hidden_layers: 2, num_attention_heads: 2, n_routed_experts: 4, q_lora_rank: 16, kv_lora_rank: 16,
        qk_nope_head_dim: 8, qk_rope_head_dim: 8, v_head_dim: 8}}
data: {{source: {corpus}, sequence_length: 32, heldout_fraction: 0.3}}
train: {{steps: 60, batch_size: 4, learning_rate: 5.0e-3, warmup_steps: 5, evaluate_every_steps: 20}}
checkpoint: {{every_steps: 10}}
launch: {{nproc_per_node: 2}}
retry: {{delay_s: 0.1}}
register_model: {{model_name: pipeline}}
serve: {{port: 0}}
"""


# One client, because making one takes longer than most requests; it keeps no connection to a server that may end.
_http = httpx.Client(trust_env=False, timeout=60, limits=httpx.Limits(max_keepalive_connections=0))


def wait_for(condition: Callable[[], Any], what: str, *, deadline_s: float = DEADLINE_S) -> Any:
    """The first true value of `condition`; polls without judging how long it took."""
    end = time.monotonic() + deadline_s
    while not (value := condition()):
        assert time.monotonic() < end, f"gave up waiting for {what}"
        time.sleep(0.05)
    return value


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def answers(url: str) -> bool:
    try:
        return _http.get(url).is_success
    except httpx.HTTPError:
        return False


def end(process: subprocess.Popen[Any]) -> None:
    process.terminate()
    try:
        process.wait(timeout=30)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def kill(process: subprocess.Popen[Any]) -> None:
    """At once, with everything that it started."""
    if process.poll() is None:
        for one in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
            one.kill()
    process.wait()


@dataclass(frozen=True)
class Project:
    """The directory that everything happens in, and how programs are started there."""

    home: Path
    api_url: str

    @property
    def config(self) -> str:
        return str(self.home / "mini.yaml")

    @property
    def runs(self) -> Path:
        return self.home / "runs"

    @property
    def environment(self) -> dict[str, str]:
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("PREFECT_", "MLFLOW_"))}
        return kept | {
            "PREFECT_HOME": str(self.home / "prefect"),
            "PREFECT_API_URL": self.api_url,
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "PREFECT_WORKER_QUERY_SECONDS": "1",
            "DO_NOT_TRACK": "1",
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            "PYTHONPATH": str(ROOT),
            "NO_PROXY": "127.0.0.1",
            "OMP_NUM_THREADS": "1",
            "COLUMNS": "400",
        }

    def start(self, *arguments: str, log: str) -> subprocess.Popen[bytes]:
        with (self.home / f"{log}.log").open("ab") as output:
            return subprocess.Popen(
                [sys.executable, "-m", *arguments],
                stdout=output,
                stderr=subprocess.STDOUT,
                env=self.environment,
                cwd=ROOT,
                start_new_session=True,
            )

    def call(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", *arguments]
        return subprocess.run(command, capture_output=True, text=True, env=self.environment, cwd=ROOT, check=False)

    def cherry(self, command: str, *overrides: str) -> subprocess.CompletedProcess[str]:
        return self.call("flows.cli", command, self.config, *overrides)

    def api(self, path: str, body: dict[str, Any] | None = None) -> Any:
        url = f"{self.api_url}/{path}"
        answer = _http.get(url) if body is None else _http.post(url, json=body)
        answer.raise_for_status()
        return answer.json()

    def deployment_run(self, deployment: str, **parameters: Any) -> subprocess.CompletedProcess[str]:
        given = [part for key, value in parameters.items() for part in ("-p", f"{key}={json.dumps(value)}")]
        return self.call("prefect", "deployment", "run", deployment, *given)

    def run_deployment(self, deployment: str, **parameters: Any) -> str:
        """Start a deployment's run; its id."""
        ended = self.deployment_run(deployment, config=self.config, **parameters)
        assert ended.returncode == 0, ended.stdout + ended.stderr
        line = next(line for line in ended.stdout.splitlines() if "UUID:" in line)
        return line.split("UUID:")[1].strip()

    def wait_for(self, condition: Callable[[], Any], what: str) -> Any:
        return wait_for(condition, what)

    def end_of(self, flow_run_id: str) -> str:
        """The state that a flow run ends in."""
        terminal = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")
        return str(wait_for(lambda: (state := self.state(flow_run_id)) in terminal and state, "the end of a flow run"))

    def state(self, flow_run_id: str) -> str:
        return str(self.api(f"flow_runs/{flow_run_id}")["state_type"])

    @property
    def mlflow(self) -> MlflowClient:
        with warnings.catch_warnings():
            # MLflow's own tables use what SQLAlchemy has deprecated, which shows when they are first used.
            warnings.filterwarnings("ignore", message="The ``noload`` loader strategy")
            client = MlflowClient(f"sqlite:///{self.runs}/mlflow.db")
            client.search_experiments(max_results=1)
            return client

    def processes(self, name: str) -> list[list[str]]:
        """Command lines of every process that works on a run."""
        found = []
        for process in psutil.process_iter(["cmdline", "status"]):
            line = process.info["cmdline"] or []
            if process.info["status"] != psutil.STATUS_ZOMBIE and any(str(self.runs / name) in word for word in line):
                found.append(line)
        return found

    def mlflow_runs(self, name: str) -> dict[str, Any]:
        """The MLflow runs of a run, by step; the flow's own is `flow`."""
        client = self.mlflow
        experiment = client.get_experiment_by_name("cherry")
        assert experiment is not None
        ours = [f"{name}-{step}" for step in STEPS] + [name]
        runs = client.search_runs([experiment.experiment_id], max_results=500)
        found = [run for run in runs if run.data.tags.get("cherry.run") in ours]
        by_step = {run.data.tags["cherry.step"]: run for run in found}
        assert len(by_step) == len(found)
        return by_step

    def versions(self, run: str) -> list[Any]:
        """Registered versions that a run made."""
        return [one for one in self.mlflow.search_model_versions("name = 'pipeline'") if one.tags["run"] == run]

    def metrics(self, name: str) -> list[dict[str, Any]]:
        path = self.runs / name / "train" / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text().split("\n")[:-1]] if path.exists() else []

    def step(self, name: str, step: str) -> dict[str, Any]:
        return dict(json.loads((self.runs / name / "steps" / f"{step}.json").read_text()))


@pytest.fixture(scope="session")
def project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    """A project with a Prefect server, the work pool and the deployments of prefect.yaml."""
    home = tmp_path_factory.mktemp("project")
    corpus, words = home / "corpus", "the model reads a page and writes the next word while experts share every token"
    corpus.mkdir()
    choose = random.Random(0)
    for number in range(44):
        lines = [" ".join(choose.choices(words.split(), k=12)) for _ in range(20)]
        (corpus / f"{number:02d}.txt").write_text("\n".join(lines))
    port = free_port()
    made = Project(home, f"http://127.0.0.1:{port}/api")
    Path(made.config).write_text(_CONFIG.format(runs=made.runs, corpus=corpus))
    server = made.start("prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port), log="server")
    try:
        wait_for(lambda: answers(f"{made.api_url}/health"), "the Prefect server")
        for arguments in (("work-pool", "create", "cherry", "--type", "process"), ("--no-prompt", "deploy", "--all")):
            ended = made.call("prefect", *arguments)
            assert ended.returncode == 0, ended.stdout + ended.stderr
        yield made
    finally:
        from tasks.processes.replicas import stop_serving

        stop_serving(str(made.runs))
        end(server)


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
