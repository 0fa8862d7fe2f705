"""What this machine must have for a run, and that two processes never work on one run."""

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from base import storage
from base.errors import ConfigError, OperationalError
from tasks.parameters import resolve
from tasks.provision import is_alive, preflight, read_cluster, release, take_lease
from tasks.steps import RunContext

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def context(tmp_path):
    config = resolve("configs/tiny.yaml", {"runs_directory": str(tmp_path)})
    (tmp_path / "tiny").mkdir()
    return RunContext(str(tmp_path / "tiny"), config)


def test_a_lease_is_taken_taken_again_and_given_back(context):
    take_lease(context)
    take_lease(context)
    assert storage.read_json(f"{context.directory}/lease.json")["pid"] == os.getpid()
    release(context.directory)
    release(context.directory)
    assert list(context.path.iterdir()) == []


def test_a_live_process_keeps_others_away_and_a_dead_one_does_not(context):
    holder = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    record = {"pid": holder.pid, "created": psutil.Process(holder.pid).create_time()}
    storage.write_json(f"{context.directory}/lease.json", record)
    with pytest.raises(OperationalError, match=f"process {holder.pid} is working on this run"):
        take_lease(context)
    release(context.directory)
    assert (context.path / "lease.json").exists()
    holder.communicate(b"\n")
    assert not is_alive(**record)
    take_lease(context)
    assert storage.read_json(f"{context.directory}/lease.json")["pid"] == os.getpid()


def test_a_pid_that_was_given_to_another_process_is_not_the_holder():
    assert is_alive(os.getpid(), psutil.Process().create_time())
    assert not is_alive(os.getpid(), psutil.Process().create_time() - 100.0)


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"launch": {"nnodes": 2, "master_port": 29500}}, ConfigError, r"launch\.nnodes: cluster 'local' has one node"),
        ({"cluster": "slots.yaml", "launch": {"nproc_per_node": 4}}, ConfigError, "has 2 slots"),
        ({"model": {"preset": "671b"}, "train": {"batch_size": 16}}, OperationalError, "memory: .* GiB are free"),
    ],
)
def test_what_does_not_fit_is_told(tmp_path, monkeypatch, changes, error, match):
    config = resolve(str(ROOT / "configs" / "tiny.yaml"), {**changes, "runs_directory": str(tmp_path)})
    (tmp_path / "slots.yaml").write_text("kind: local\nslots: 2\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=match):
        preflight(config, tmp_path / "run")


def test_cluster_files_are_read_strictly(tmp_path):
    for path in (ROOT / "configs" / "clusters").glob("*.yaml"):
        assert read_cluster(str(path)).kind == "local"
    (tmp_path / "wrong.yaml").write_text("kind: slurm\nslotz: 2\n")
    with pytest.raises(ConfigError, match="slotz"):
        read_cluster(str(tmp_path / "wrong.yaml"))
