"""Runs and kept clusters that hold hosts of a provider whose hosts are this machine's loopback addresses."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from base import storage
from cherry.cluster import read_cluster
from tasks.overrides import resolve, write_resolved
from tasks.providers.protocol import write_hosts, write_reservation
from tasks.providers.registry import find_provider, reserve

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def cluster_file(tmp_path: Path, two_hosts: Path) -> str:
    """A cluster of two loopback addresses, held for an hour at most."""
    path = tmp_path / "pair.yaml"
    path.write_text(
        "kind: nodes\nprovider: two-hosts\ngpu: H100\nmax_lifetime: 1h\nnodes: [{host: 127.0.0.1}, {host: 127.0.0.2}]\n"
    )
    return str(path)


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    return tmp_path / "runs"


@pytest.fixture
def owner() -> Iterator[subprocess.Popen[bytes]]:
    """A process that may own a run."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    yield process
    process.kill()
    process.communicate()


@pytest.fixture
def take_for_run(
    runs: Path, cluster_file: str, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str, subprocess.Popen[bytes]], Path]:
    """Takes hosts as a run does whose flow is a process; returns the run directory."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")

    def take(name: str, owner: subprocess.Popen[bytes], held_s: float = 0.0) -> Path:
        tracking = {"uri": f"json:{runs / 'tracking'}"}
        config = resolve(
            str(ROOT / "configs" / "tiny.yaml"),
            {"name": name, "runs_directory": str(runs), "cluster": cluster_file, "tracking": tracking},
        )
        directory = Path(write_resolved(config))
        lease = {"pid": owner.pid, "created": psutil.Process(owner.pid).create_time(), "token": "t"}
        storage.write_json(str(directory / "lease.json"), lease)
        asked = reserve(cluster_file, read_cluster(cluster_file), str(directory), name, nodes=2, ranks_per_node=1)
        asked = asked.model_copy(update={"since": time.time() - held_s, "until": time.time() - held_s + 3600.0})
        write_reservation(directory, asked)
        write_hosts(directory, find_provider("two-hosts").acquire(asked))
        return directory

    return take


@pytest.fixture
def calls(runs: Path) -> Callable[[], list[str]]:
    """What the provider was asked to do by the run of a name: `acquire` or `release`, and the name."""

    def read() -> list[str]:
        files = [runs / "calls", runs / "_clusters" / "calls"]
        return [line for path in files if path.exists() for line in path.read_text().splitlines()]

    return read
