"""What this machine must have for a run, and that two processes never work on one run."""

import fcntl
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from base import storage
from base.errors import ConfigError, DoesNotFitError, OperationalError
from cherry.cluster import read_cluster
from tasks.lifecycle import end_leftovers
from tasks.overrides import resolve
from tasks.provision import is_alive, preflight, release, take_lease
from tasks.steps import RunContext

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def context(tmp_path):
    tracking = {"uri": "http://127.0.0.1:9"}  # nothing listens there
    config = resolve("configs/tiny.yaml", {"runs_directory": str(tmp_path), "tracking": tracking})
    (tmp_path / "tiny").mkdir()
    return RunContext(str(tmp_path / "tiny"), config)


def test_a_lease_is_taken_taken_again_and_given_back(context):
    take_lease(context.path)
    take_lease(context.path)
    assert storage.read_json(f"{context.directory}/lease.json")["pid"] == os.getpid()
    release(context.directory)
    release(context.directory)
    assert [path.name for path in context.path.iterdir()] == ["lease.lock"]


def test_a_live_process_keeps_others_away_and_a_dead_one_does_not(context):
    holder = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    record = {"pid": holder.pid, "created": psutil.Process(holder.pid).create_time()}
    storage.write_json(f"{context.directory}/lease.json", record)
    with pytest.raises(OperationalError, match=rf"process {holder.pid} on \S+ is working on this run"):
        take_lease(context.path)
    release(context.directory)
    assert (context.path / "lease.json").exists()
    holder.communicate(b"\n")
    assert not is_alive(**record)
    take_lease(context.path)
    assert storage.read_json(f"{context.directory}/lease.json")["pid"] == os.getpid()


def test_nobody_takes_a_lease_while_it_is_judged(context, monkeypatch):
    """Else a process that read the lease as dead could remove the one that another has taken since."""
    gone = {"pid": 2**22, "created": 0.0}
    storage.write_json(f"{context.directory}/lease.json", gone)
    judged = []

    def judging(pid, created):
        with open(f"{context.directory}/lease.lock") as other, pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        judged.append(pid)
        return is_alive(pid, created)

    monkeypatch.setattr("tasks.provision.is_alive", judging)
    take_lease(context.path)
    release(context.directory)
    storage.write_json(f"{context.directory}/lease.json", gone)
    end_leftovers(context.config)
    assert len(judged) >= 2
    assert not (context.path / "lease.json").exists()


def test_another_hosts_lease_counts_while_it_is_renewed(context):
    path = context.path / "lease.json"
    # A pid that is nobody's here.
    storage.write_json(str(path), {"host": "node7", "boot": "b", "pid": 2**22, "created": 0.0, "token": "t"})
    end_leftovers(context.config)
    with pytest.raises(OperationalError, match=r"process 4194304 on node7 is working on this run"):
        take_lease(context.path)
    hour_ago = path.stat().st_mtime - 3600.0
    os.utime(path, (hour_ago, hour_ago))
    take_lease(context.path)
    assert storage.read_json(str(path))["pid"] == os.getpid()


def test_a_lease_from_before_a_restart_of_this_host_is_left_to_go_stale(context):
    path = context.path / "lease.json"
    take_lease(context.path)
    storage.write_json(str(path), {**storage.read_json(str(path)), "boot": "another"})
    release(context.directory)
    with pytest.raises(OperationalError, match="is working on this run"):
        take_lease(context.path)


def test_the_holder_renews_its_lease_until_it_is_given_back(context, monkeypatch):
    monkeypatch.setattr("tasks.provision._RENEW_S", 0.01)
    others = set(threading.enumerate())
    take_lease(context.path)
    path = context.path / "lease.json"
    for _ in range(2):
        os.utime(path, (1.0, 1.0))
        deadline = time.monotonic() + 30.0
        while path.stat().st_mtime == 1.0:
            assert time.monotonic() < deadline, "the lease is not renewed"
    (renewing,) = set(threading.enumerate()) - others
    take_lease(context.path)
    assert set(threading.enumerate()) - others == {renewing}
    release(context.directory)
    renewing.join(30.0)
    assert not renewing.is_alive()


def test_a_pid_that_was_given_to_another_process_is_not_the_holder():
    assert is_alive(os.getpid(), psutil.Process().create_time())
    assert not is_alive(os.getpid(), psutil.Process().create_time() - 100.0)


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"launch": {"nnodes": 2, "master_port": 29500}}, ConfigError, r"launch\.nnodes: cluster 'local' has one node"),
        ({"cluster": "slots.yaml", "launch": {"nproc_per_node": 4}}, ConfigError, "has 2 slots"),
        ({"model": {"preset": "671b"}, "train": {"batch_size": 16}}, OperationalError, "memory: .* GiB are free"),
        ({"cluster": "nodes.yaml"}, ConfigError, "only this machine"),
        ({"cluster": "gpu.yaml", "model": {"preset": "16b"}}, DoesNotFitError, r"no room for .* What would fit: "),
    ],
)
def test_what_does_not_fit_is_told(tmp_path, monkeypatch, changes, error, match):
    config = resolve(str(ROOT / "configs" / "tiny.yaml"), {**changes, "runs_directory": str(tmp_path)})
    (tmp_path / "slots.yaml").write_text("kind: local\nslots: 2\n")
    (tmp_path / "nodes.yaml").write_text("kind: nodes\ngpu: H100\nnodes: 4\ngpus_per_node: 8\n")
    (tmp_path / "gpu.yaml").write_text("kind: nodes\ngpu: H100\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=match):
        preflight(config, tmp_path / "run")


def test_cluster_files_are_read_strictly(tmp_path):
    for path in (ROOT / "configs" / "clusters").glob("*.yaml"):
        assert read_cluster(str(path)).kind == ("local" if path.stem in ("local", "laptop") else "nodes")
    (tmp_path / "wrong.yaml").write_text("kind: slurm\nslotz: 2\n")
    with pytest.raises(ConfigError, match="slotz"):
        read_cluster(str(tmp_path / "wrong.yaml"))
