"""What tests of several packages share: an S3 server over HTTP on this machine, and tiny training jobs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    """URL of an S3 server in a thread of this process."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """URI of a fresh, empty bucket; the environment says where it is, to this process and to those it starts."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    bucket = f"bucket-{uuid.uuid4().hex[:12]}"
    httpx.put(f"{s3_endpoint}/{bucket}", trust_env=False).raise_for_status()
    return f"s3://{bucket}"


class Job:
    """A tiny training job in a directory of its own, started as a person would: by the launcher, in a subprocess."""

    def __init__(self, directory: Path, config: Path, prepared: Path) -> None:
        self.directory = directory
        self.config = config
        directory.mkdir(parents=True)
        shutil.copytree(prepared, directory / "data")

    def command(self, *flags: str, ranks: int = 1, launcher: tuple[str, ...] = ()) -> list[str]:
        """What to run; `flags` are train.py's, `launcher` the launcher's own."""
        start = [sys.executable, "-m", "cherry.launcher", f"--nproc_per_node={ranks}", *launcher, "train.py"]
        return [*start, "--config", str(self.config), "--run_dir", str(self.directory), *flags]

    def start(self, *flags: str, ranks: int = 1) -> subprocess.Popen[str]:
        """Start it and return at once."""
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        return subprocess.Popen(self.command(*flags, ranks=ranks), text=True, cwd=ROOT, env=_environment(), **pipes)

    def run(self, *flags: str, ranks: int = 1, launcher: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
        """Run it to its end."""
        command = self.command(*flags, ranks=ranks, launcher=launcher)
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=_environment(), check=False)

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The metrics stream so far."""
        path = self.directory / "train" / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    @property
    def losses(self) -> list[float]:
        """The loss of every step."""
        return [line["loss"] for line in self.metrics]

    def checkpoint(self, step: int) -> Path:
        """Directory of one step's checkpoint."""
        return self.directory / "train" / "checkpoints" / f"step_{step}"


def _environment() -> dict[str, str]:
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}


@pytest.fixture(scope="session")
def prepared_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Token shards of 60 small documents, made once."""
    from cherry.config import DataConfig
    from cherry.data import prepare

    root = tmp_path_factory.mktemp("corpus")
    words = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta"]
    for number in range(60):
        lines = [" ".join(words[(number * 7 + line * k) % 8] for k in range(1, 9)) for line in range(12)]
        (root / f"{number:02d}.txt").write_text("\n".join(lines))
    config = DataConfig(source=str(root), sequence_length=32, heldout_fraction=0.2)
    prepare(config, vocab_size=600, directory=str(root / "data"))
    return root / "data"


@pytest.fixture(scope="session")
def job_config(tmp_path_factory: pytest.TempPathFactory, prepared_data: Path) -> Path:
    """A config that takes a second to train: every part of the architecture, two layers."""
    path = tmp_path_factory.mktemp("config") / "mini.yaml"
    path.write_text(
        f"""\
name: mini
model: {{preset: tiny, vocab_size: 600, hidden_size: 32, intermediate_size: 64, moe_intermediate_size: 16,
        num_hidden_layers: 2, q_lora_rank: 16, kv_lora_rank: 16, qk_nope_head_dim: 16, qk_rope_head_dim: 8,
        v_head_dim: 16}}
data: {{source: "{prepared_data.parent}", sequence_length: 32, heldout_fraction: 0.2}}
train: {{steps: 12, batch_size: 8, warmup_steps: 2, learning_rate: 3.0e-3}}
checkpoint: {{every_steps: 4}}
"""
    )
    return path


@pytest.fixture
def make_job(tmp_path: Path, job_config: Path, prepared_data: Path) -> Callable[[str], Job]:
    """Makes jobs by name inside the test's own directory."""
    return lambda name: Job(tmp_path / name, job_config, prepared_data)
