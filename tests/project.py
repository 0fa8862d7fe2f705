"""A project as a person has it: a directory with a real Prefect server, its deployments, and a small corpus."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
from mlflow import MlflowClient

from tests.processes import command_line, every, kill_all, tree

ROOT = Path(__file__).resolve().parents[1]
DEADLINE_S = 240.0
HANG_S = 600.0
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
        kill_all(reversed(tree(process.pid)))
    process.wait()


@dataclass
class Project:
    """The directory that everything happens in, and how programs are started there."""

    home: Path
    api_url: str
    server: subprocess.Popen[bytes] | None = None
    """The Prefect server, once it was started."""
    tracking_uri: str | None = None
    """Of MLflow; `None` is the database in the runs directory."""
    variables: dict[str, str] = field(default_factory=dict, repr=False)
    """Of the environment of its programs."""

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
            **self.variables,
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

    def start_server(self) -> None:
        """Start the Prefect server, and wait until it answers."""
        port = self.api_url.removesuffix("/api").rpartition(":")[2]
        self.server = self.start("prefect", "server", "start", "--host", "127.0.0.1", "--port", port, log="server")
        wait_for(lambda: answers(f"{self.api_url}/health"), "the Prefect server")

    def restart_server(self) -> None:
        """Kill the Prefect server outright and start it again."""
        assert self.server is not None
        kill(self.server)
        self.start_server()

    def call(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run a program to its end. One that hangs is ended, and what its threads were doing is told."""
        command = [sys.executable, "-X", "faulthandler", "-m", *arguments]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        with subprocess.Popen(command, text=True, env=self.environment, cwd=ROOT, **pipes) as process:
            try:
                output, errors = process.communicate(timeout=HANG_S)
            except subprocess.TimeoutExpired:
                family = tree(process.pid)
                left = [" ".join(command_line(one)) for one in family[1:]]
                process.send_signal(signal.SIGABRT)  # Python prints the stacks of all threads
                psutil.wait_procs(family[:1], timeout=10)
                kill_all(family)
                output, errors = process.communicate()
                told = f"{command} still ran after {HANG_S} s, with {left}"
                raise AssertionError(f"{told}\n{output}\n{errors}") from None
        return subprocess.CompletedProcess(command, process.returncode, output, errors)

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
            client = MlflowClient(self.tracking_uri or f"sqlite:///{self.runs}/mlflow.db")
            client.search_experiments(max_results=1)
            return client

    def flow_process(self, name: str) -> psutil.Process:
        """The process that holds the lease of a run."""
        return psutil.Process(json.loads((self.runs / name / "lease.json").read_text())["pid"])

    def processes(self, name: str) -> list[list[str]]:
        """Command lines of every process that works on a run."""
        found = []
        for process in every("cmdline", "status"):
            line = process.info["cmdline"] or []
            if process.info["status"] != psutil.STATUS_ZOMBIE and any(str(self.runs / name) in word for word in line):
                found.append(line)
        return found

    def mlflow_runs(self, name: str) -> dict[str, Any]:
        """The MLflow runs of a run, by step; the flow's own is `flow`, and of several releases the newest is here."""
        client = self.mlflow
        experiment = client.get_experiment_by_name("cherry")
        assert experiment is not None
        ours = [f"{name}-{step}" for step in STEPS] + [name]
        runs = client.search_runs([experiment.experiment_id], max_results=500)
        found = [run for run in runs if run.data.tags.get("cherry.run") in ours]
        steps = [run.data.tags["cherry.step"] for run in found if run.data.tags["cherry.step"] != "deploy"]
        assert len(set(steps)) == len(steps)
        return {run.data.tags["cherry.step"]: run for run in reversed(found)}  # the server's order is newest first

    def versions(self, run: str) -> list[Any]:
        """Registered versions that a run made."""
        return [one for one in self.mlflow.search_model_versions("name = 'pipeline'") if one.tags["run"] == run]

    def metrics(self, name: str) -> list[dict[str, Any]]:
        path = self.runs / name / "train" / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text().split("\n")[:-1]] if path.exists() else []

    def step(self, name: str, step: str) -> dict[str, Any]:
        return dict(json.loads((self.runs / name / "steps" / f"{step}.json").read_text()))


@contextmanager
def running_project(home: Path) -> Iterator[Project]:
    """A project in a directory, with its Prefect server, set up by `cherry setup`."""
    made = new_project(home, f"http://127.0.0.1:{free_port()}/api")
    try:
        made.start_server()
        ended = made.call("flows.cli", "setup")
        assert ended.returncode == 0, ended.stdout + ended.stderr
        yield made
    finally:
        from tasks.processes.replicas import stop_serving

        stop_serving(str(made.runs))
        if made.server is not None:
            end(made.server)


def new_project(home: Path, api_url: str) -> Project:
    """A project in a directory: its corpus and its config."""
    corpus, words = home / "corpus", "the model reads a page and writes the next word while experts share every token"
    corpus.mkdir()
    choose = random.Random(0)
    for number in range(44):
        lines = [" ".join(choose.choices(words.split(), k=12)) for _ in range(20)]
        (corpus / f"{number:02d}.txt").write_text("\n".join(lines))
    made = Project(home, api_url)
    Path(made.config).write_text(_CONFIG.format(runs=made.runs, corpus=corpus))
    return made
