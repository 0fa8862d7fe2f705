"""The lease of a run directory: two processes never work on one run."""

import fcntl
import os
import subprocess
import sys
import threading
import time

import psutil
import pytest

from base import storage
from base.errors import DataError, OperationalError
from tasks.interruptions.leftovers import end_leftovers
from tasks.lease import is_held, read_lease, take_lease
from tasks.overrides import resolve
from tasks.processes.process import is_alive
from tasks.provision import release
from tasks.steps import RunContext


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

    monkeypatch.setattr("tasks.lease.is_alive", judging)
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


def test_the_holder_renews_its_lease_until_it_is_given_back(context):
    others = set(threading.enumerate())
    take_lease(context.path, renew_s=0.01)
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


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        '{"pid": 1}',
        '{"pid": "x", "created": 1.0, "token": "t"}',
        '{"pid": -5, "created": 1.0}',
        "[" * 100_000,
    ],
)
def test_a_damaged_lease_is_a_sentence_and_keeps_others_out(context, content):
    (context.path / "lease.json").write_text(content)
    for call in (read_lease, is_held, take_lease):
        with pytest.raises(DataError, match=r"lease\.json: it is damaged, .* Make sure that none does, and remove it"):
            call(context.path)
    assert (context.path / "lease.json").read_text() == content
