"""What tests of several packages share: an S3 server over HTTP, programs of several ranks, tiny training jobs."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
_S3_KEY, _S3_SECRET = "test", "testtest"
if "PYTEST_XDIST_WORKER" in os.environ:
    # Before torch is imported: the threads of several processes would wait for each other's cores.
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let the long groups start first, where several processes share the tests."""
    slow: dict[Path, bool] = {}
    for item in items:
        slow[item.path] = slow.get(item.path, False) or item.get_closest_marker("slow") is not None
    if "PYTEST_XDIST_WORKER" in os.environ:
        items.sort(key=lambda item: (item.path.parent.name != "e2e", not slow[item.path]))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Say which tests share a process: those of a file, for its fixtures; all of e2e/, for its server and its runs.

    Marks of the group would do, but with pytest 9.2 xdist 3.8 does not see them.
    """
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            path = nodeid.split("::", 1)[0]
            return "e2e" if path.startswith("tests/e2e/") else path

    return ByFile(config, log)


@pytest.fixture(scope="session")
def s3_endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of an S3 server: rclone's, in front of a directory."""
    scripts = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    program = shutil.which("rclone", path=scripts)
    assert program, "no rclone: install the development dependencies"
    command = [program, "serve", "s3", "--addr", "127.0.0.1:0", "--auth-key", f"{_S3_KEY},{_S3_SECRET}"]
    command += ["--config", os.devnull, str(tmp_path_factory.mktemp("s3"))]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        started = next((found for line in server.stderr if (found := re.search(r"http://[\d.:]+", line))), None)
        assert started, f"rclone ended with {server.wait()}"
        # What it says from now on is read, so that it never waits for a reader.
        drain = threading.Thread(target=server.stderr.read, daemon=True)
        drain.start()
        yield started[0]
        server.terminate()
        drain.join()


@pytest.fixture
def s3(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """URI of a fresh, empty bucket; the environment says where it is, to this process and to those it starts."""
    from s3fs import S3FileSystem

    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", _S3_KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", _S3_SECRET)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    # rclone answers a range of bytes with the whole object's checksum, which botocore compares by default.
    monkeypatch.setenv("AWS_RESPONSE_CHECKSUM_VALIDATION", "when_required")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    bucket = f"bucket-{uuid.uuid4().hex[:12]}"
    S3FileSystem().mkdir(bucket)
    return f"s3://{bucket}"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Mounts a tmpfs of so many KiB for the test; skips the test where that is not allowed."""
    mounted: list[Path] = []

    def mount(kib: int) -> Path:
        directory = tmp_path / "small"
        directory.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", str(directory)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except FileNotFoundError:
            pytest.skip("no mount program")
        if done.returncode:
            pytest.skip(f"cannot mount a tmpfs here: {done.stderr.strip()}")
        mounted.append(directory)
        return directory

    yield mount
    for directory in mounted:
        subprocess.run(["umount", str(directory)], check=True)


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
def environment() -> dict[str, str]:
    """What programs of tests see: this checkout first, one thread each."""
    return _environment()


@pytest.fixture(scope="session")
def run_together(environment: dict[str, str]) -> Callable[[list[list[str]]], None]:
    """Runs programs side by side; one that fails ends the others, which would wait for it."""
    return lambda commands: _run_together(commands, environment)


def _run_together(commands: list[list[str]], environment: dict[str, str]) -> None:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    started = [subprocess.Popen(command, text=True, env=environment, **pipes) for command in commands]

    def wait(process: subprocess.Popen[str]) -> str:
        output = process.communicate()[0]
        if process.returncode:
            for other in started:
                other.kill()
        return output

    try:
        with ThreadPoolExecutor(len(started)) as pool:
            output = list(pool.map(wait, started))
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0] * len(started), "\n".join(output)


@pytest.fixture(scope="session")
def prepared_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Token shards of 60 small documents, made once."""
    from cherry.data.prepare import prepare
    from cherry.job_config import DataConfig

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


@pytest.fixture(scope="session")
def new_job(job_config: Path, prepared_data: Path) -> Callable[[Path], Job]:
    """Makes a job in a new directory."""
    return lambda directory: Job(directory, job_config, prepared_data)


@pytest.fixture
def make_job(tmp_path: Path, new_job: Callable[[Path], Job]) -> Callable[[str], Job]:
    """Makes jobs by name inside the test's own directory."""
    return lambda name: new_job(tmp_path / name)


@pytest.fixture
def two_hosts(monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of an installed package that adds the provider `two-hosts`, importable here and in programs."""
    folder = ROOT / "tests" / "plugins"
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")])))
    return folder
