"""A job on hosts that share no file system: checkpoints and data in an object store, small files carried over ssh."""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from base import storage
from cherry.watch.node_sampler import read_nodes
from cherry.watch.rank_report import read_job
from tests.chaos.test_lost_hosts import rank_of
from tests.hosts import LabHosts, lab_hosts
from tests.object_stores import leading_to, make_bucket, seaweedfs
from tests.supervised import Supervised, until
from tests.training_job import environment_of_programs

pytestmark = pytest.mark.slow
CHECKPOINTS = "s3://bucket/mini"
# Reports are so often that ranks are compared in a job of seconds.
FLAGS = ("--set", f"checkpoint.directory={CHECKPOINTS}", "--set", "train.rank_report_every_s=1")


@pytest.fixture
def job(make_job: Callable[[str], Any]) -> Any:
    return make_job("job")


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """Where each host has a disk of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    return folder


@pytest.fixture
def hosts(tmp_path: Path, disk: Path, job: Any) -> Iterator[LabHosts]:
    """Override: node1, node2 and node3 see neither the job's run directory nor each other's disks."""
    yield from lab_hosts(tmp_path / "lab", 3, own=[disk, job.directory])


@pytest.fixture
def supervised(tmp_path: Path, hosts: LabHosts, job: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Supervised]:
    """Override: a job on these hosts, with a store that all of them reach."""
    (tmp_path / "s3").mkdir()
    with seaweedfs(tmp_path / "s3", hosts.gateway) as url, leading_to(url, monkeypatch):
        make_bucket(url)
        made = Supervised(job, hosts, environment_of_programs())
        yield made
        made.end()


def seen(hosts: LabHosts, name: str, folder: Path) -> set[str]:
    """Files below a folder as a host sees it."""
    listed = subprocess.run(
        hosts.inside(name, "find", str(folder), "-type", "f"), capture_output=True, text=True, check=True
    )
    return set(listed.stdout.split())


def test_a_host_that_loses_its_power_is_replaced_and_everything_is_with_the_flow_once(supervised, disk, whole):
    supervised.start(*FLAGS, ssh={"runs_directory": str(disk)}, recovery={"spares": [{"host": "node3"}]})
    until(lambda: storage.is_committed(f"{CHECKPOINTS}/step_8"), f"checkpoint of step 8; {supervised.output}")
    train = supervised.job.directory / "train"
    until((train / "rank-1.log").exists, "files come while the job runs")
    assert not seen(supervised.hosts, "node1", supervised.job.directory), "the hosts do not see the run directory"
    supervised.hosts.power_loss("node1")  # with rank 0, the metrics, and its disk
    assert supervised.code() == 0, supervised.output
    assert supervised.events == [
        ("began", ["node1", "node2"]),
        ("ended", "node1"),
        ("began", ["node2", "node3"]),
        ("ended", None),
    ]
    assert "resumed from" in supervised.output
    assert [line["step"] for line in supervised.job.metrics] == list(range(1, 33))
    assert supervised.job.losses == whole
    # All that watches a run finds its files where the flow is.
    logs = [(train / f"rank-{rank}.log").read_text() for rank in (0, 1)]
    assert all(f"rank 0 on {host}, pid" in logs[0] for host in ("node1", "node2"))
    assert all(f"rank 1 on {host}, pid" in logs[1] for host in ("node2", "node3"))
    assert json.loads((train / "result.json").read_text())["checkpoint"] == f"{CHECKPOINTS}/step_32"
    assert [(report.rank, report.host) for report in read_job(train)] == [(0, "node2"), (1, "node3")]
    assert read_nodes(train).keys() == {"node1", "node2", "node3"}
    assert not list(train.glob("epoch-*")) and not list(train.rglob("*.tmp"))
    # Nothing of any size was written to the run directory's own place on the hosts.
    (copy,) = {path for path in seen(supervised.hosts, "node3", disk) if path.endswith("data/COMMITTED")}
    assert copy.startswith(f"{disk}/job-")
    assert not seen(supervised.hosts, "node3", supervised.job.directory)
    until(lambda: not supervised.left(), "the agents have ended too")


@pytest.mark.long
def test_the_stacks_of_a_hang_are_kept_where_the_flow_is(supervised, disk):
    recovery = {"hang_s": 8.0, "attempts": 1}
    # Whoever waits for a checkpoint is given ten minutes.
    flags = (*FLAGS, "--steps=100000", "--set", "checkpoint.every_steps=100000")
    supervised.start(*flags, ssh={"runs_directory": str(disk)}, recovery=recovery)
    until(lambda: supervised.output.count("\nstep ") > 3, "steps")
    rank_of(supervised, "node2").send_signal(signal.SIGSTOP)
    assert supervised.code() == 34, supervised.output
    (kept,) = (supervised.job.directory / "train" / "stacks").iterdir()
    assert f"The ranks' stacks are in {kept}" in supervised.output
    parts = dict(part.split(" =====\n", 1) for part in kept.read_text().split("===== ")[1:])
    assert "cherry/trainer.py" in parts["rank 0"]
    assert parts["rank 1"].startswith("no stack came")


@pytest.mark.long
def test_a_mistake_is_told_before_any_rank_starts(supervised, disk):
    supervised.start("--set", "checkpoint.directory=/shared", ssh={"runs_directory": str(disk)})
    assert supervised.code() == 11
    assert "so checkpoint.directory: must be a URI of an object store" in supervised.output
    supervised.start(*FLAGS)
    assert supervised.code() == 11
    assert "node1: it does not see the run directory" in supervised.output
    assert "ssh.runs_directory of the cluster file" in supervised.output
    supervised.start(*FLAGS, ssh={"runs_directory": "/etc/hosts/runs"})
    assert supervised.code() == 11, supervised.output
    assert "its run directory /etc/hosts/runs/job-" in supervised.output
    assert "began" not in [event for event, _ in supervised.events]
