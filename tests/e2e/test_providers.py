"""Providers under the whole flow: one of another package, whose hosts are given back, and hosts reached over ssh."""

import json
import os
import signal
import socket
import subprocess
import sys

import pytest

from tests.hosts import lab_hosts
from tests.object_stores import leading_to, make_bucket, seaweedfs
from tests.slurm import slurm_lab

pytestmark = pytest.mark.slow
SPEC = "kind: nodes\nprovider: two-hosts\ngpu: H100\nnodes: [{host: 127.0.0.1}, {host: 127.0.0.2}]\n"


@pytest.fixture
def cherry(project, two_hosts):
    """Runs `cherry run` on the cluster of two loopback addresses, where the package is installed."""
    spec = project.home / "pair.yaml"
    spec.write_text(SPEC)
    path = os.pathsep.join([project.environment["PYTHONPATH"], str(two_hosts)])
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    cluster = [f"cluster={spec}", "launch.nnodes=2", "launch.nproc_per_node=1", f"launch.master_port={port}"]
    cluster += ["register_model.model_name=paired"]  # the other tests count the versions of `pipeline`

    def run(*overrides):
        command = [sys.executable, "-m", "flows.cli", "run", project.config, *cluster, *overrides]
        environment = {**project.environment, "PYTHONPATH": path}
        return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)

    return run


def calls(project, name):
    lines = (project.runs / "calls").read_text().splitlines()
    return [line.split()[0] for line in lines if line.split()[1].startswith(f"{name}-")]


def test_a_run_trains_on_the_hosts_that_its_provider_took(project, cherry):
    ended = cherry("name=paired", "train.steps=6", "train.evaluate_every_steps=6")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert [line["step"] for line in project.metrics("paired")] == [1, 2, 3, 4, 5, 6]
    hosts = json.loads((project.runs / "paired" / "hosts.json").read_text())
    assert [host["address"] for host in hosts["hosts"]] == ["127.0.0.1", "127.0.0.2"]
    commands = json.loads((project.runs / "paired" / "train" / "commands.json").read_text())["commands"]
    assert [[word for word in command if word.startswith("--node_rank")] for command in commands] == [
        ["--node_rank=0"],
        ["--node_rank=1"],
    ]
    # Each host's launcher has trained as one rank of two.
    assert {path.name for path in (project.runs / "paired" / "train").glob("rank-*.log")} >= {"rank-1.log"}
    assert calls(project, "paired") == ["acquire", "release"]
    assert not (project.runs / "paired" / "reservation.json").exists()
    assert not project.processes("paired")


def test_a_run_that_fails_gives_its_hosts_back(project, cherry):
    ended = cherry("name=unpaired", "train.steps=6", "data.max_documents=1")
    assert ended.returncode == 13, ended.stdout + ended.stderr
    assert "held out" in ended.stdout + ended.stderr
    assert calls(project, "unpaired") == ["acquire", "release"]
    assert not (project.runs / "unpaired" / "reservation.json").exists()
    assert not project.processes("unpaired")


@pytest.mark.long
def test_training_ends_when_its_hosts_have_been_held_for_their_maximum_lifetime(project):
    spec = project.home / "short.yaml"
    spec.write_text("kind: local\nmax_lifetime: 20s\n")
    overrides = [f"cluster={spec}", "name=short", "train.steps=100000", "register_model.model_name=short"]
    ended = project.cherry("run", *overrides)
    assert ended.returncode == 10, ended.stdout + ended.stderr
    assert "max_lifetime: the hosts of" in ended.stderr and "were held for 20s" in ended.stderr
    assert not (project.runs / "short" / "reservation.json").exists()
    assert not project.processes("short")


@pytest.fixture
def given_hosts(tmp_path):
    """node1 and node2."""
    yield from lab_hosts(tmp_path / "lab", 2)


def test_a_run_trains_on_given_hosts_over_ssh(project, given_hosts):
    spec = project.home / "given.yaml"
    spec.write_text("nodes: [{host: node1}, {host: node2}]\n")
    overrides = [f"cluster={spec}", "launch.nnodes=2", "launch.nproc_per_node=1", "name=given", "train.steps=6"]
    overrides += ["train.evaluate_every_steps=6", "register_model.model_name=given"]
    command = [sys.executable, "-m", "flows.cli", "run", project.config, *overrides]
    environment = {**project.environment, "HOME": str(given_hosts.home)}
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert [line["step"] for line in project.metrics("given")] == [1, 2, 3, 4, 5, 6]
    run = project.runs / "given"
    addresses = [host["address"] for host in json.loads((run / "hosts.json").read_text())["hosts"]]
    assert addresses == [given_hosts.address(name) for name in given_hosts.names]
    attempts = [json.loads(line) for line in (run / "train" / "attempts.jsonl").read_text().splitlines()]
    assert [(one["event"], one.get("hosts")) for one in attempts] == [("began", ["node1", "node2"]), ("ended", None)]
    assert not project.processes("given")
    # What was seen of both hosts is where the flow is.
    figures = project.mlflow_runs("given")["train"].data.metrics
    assert {f"system/{name}/cpu_utilization_percentage" for name in given_hosts.names} <= figures.keys()
    runs = ["--runs-directory", str(project.runs)]
    rank = project.call("flows.cli", "logs", "given", "--rank", "1", *runs).stdout
    assert "rank 1 on node2, pid " in rank
    view = project.call("flows.cli", "top", "given", "--once", *runs).stdout
    assert [line.split()[:2] for line in view.splitlines() if line.split()[:1] in (["0"], ["1"])] == [
        ["0", "node1"],
        ["1", "node2"],
    ]


@pytest.fixture
def own_disks(project, tmp_path):
    """node1 and node2, which see neither the runs directory nor each other's `disk`."""
    for folder in (project.runs, tmp_path / "disk"):
        folder.mkdir(exist_ok=True)
    yield from lab_hosts(tmp_path / "lab", 2, own=[project.runs, tmp_path / "disk"])


@pytest.mark.long
def test_a_run_trains_on_hosts_that_share_no_file_system(project, own_disks, tmp_path, monkeypatch):
    spec = project.home / "apart.yaml"
    spec.write_text(f"nodes: [{{host: node1}}, {{host: node2}}]\nssh: {{runs_directory: {tmp_path / 'disk'}}}\n")
    overrides = [f"cluster={spec}", "launch.nnodes=2", "launch.nproc_per_node=1", "name=apart", "train.steps=6"]
    overrides += ["train.evaluate_every_steps=6", "register_model.model_name=apart"]
    command = [sys.executable, "-m", "flows.cli", "run", project.config, *overrides]

    def run(*more):
        environment = {**project.environment, "HOME": str(own_disks.home), "NO_PROXY": os.environ["NO_PROXY"]}
        return subprocess.run([*command, *more], capture_output=True, text=True, env=environment, check=False)

    (tmp_path / "s3").mkdir()
    with seaweedfs(tmp_path / "s3", own_disks.gateway) as url, leading_to(url, monkeypatch):
        make_bucket(url)
        refused = run("name=refused")
        assert refused.returncode == 11, refused.stdout + refused.stderr
        assert "so checkpoint.directory: must be a URI of an object store" in refused.stderr
        assert not (project.runs / "refused").exists()
        ended = run("checkpoint.directory=s3://bucket/apart")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert [line["step"] for line in project.metrics("apart")] == [1, 2, 3, 4, 5, 6]
    assert (project.runs / "apart" / "export" / "COMMITTED").exists()
    figures = project.mlflow_runs("apart")["train"].data.metrics
    assert {f"system/{name}/cpu_utilization_percentage" for name in own_disks.names} <= figures.keys()
    runs = ["--runs-directory", str(project.runs)]
    assert "rank 1 on node2, pid " in project.call("flows.cli", "logs", "apart", "--rank", "1", *runs).stdout


@pytest.fixture
def slurm(tmp_path):
    """A Slurm cluster of node1 and node2."""
    yield from slurm_lab(tmp_path / "lab", 2)


@pytest.mark.long
def test_a_run_trains_as_a_slurm_job_and_one_that_slurm_refuses_leaves_no_trace(project, slurm):
    spec = project.home / "slurm.yaml"
    overrides = [f"cluster={spec}", "launch.nnodes=2", "launch.nproc_per_node=1", "train.steps=6"]
    overrides += ["train.evaluate_every_steps=6", "register_model.model_name=queued"]
    environment = {**project.environment, "SLURM_CONF": str(slurm.conf)}

    def run(*more):
        command = [sys.executable, "-m", "flows.cli", "run", project.config, *overrides, *more]
        return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)

    spec.write_text("provider: slurm\nnodes: 2\nslurm: {partition: none}\n")
    refused = run("name=refused")
    assert refused.returncode == 11, refused.stdout + refused.stderr
    assert "sbatch refuses" in refused.stderr
    assert not (project.runs / "refused").exists()
    spec.write_text("provider: slurm\nnodes: 2\n")
    ended = run("name=queued")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert [line["step"] for line in project.metrics("queued")] == [1, 2, 3, 4, 5, 6]
    directory = project.runs / "queued"
    attempts = [json.loads(line) for line in (directory / "train" / "attempts.jsonl").read_text().splitlines()]
    assert [(one["event"], one.get("hosts")) for one in attempts] == [("began", ["node1", "node2"]), ("ended", None)]
    (job,) = slurm.jobs()
    assert (job["JobState"], job["JobName"].startswith("queued-")) == ("COMPLETED", True)
    assert not (directory / "reservation.json").exists()
    assert slurm.left() == []


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_no_slurm_job_outlives_its_run_and_the_same_command_resumes(project, slurm, number):
    spec, name = project.home / "slurm.yaml", f"ended-{number.name.lower()}"
    spec.write_text("provider: slurm\nnodes: 2\n")
    overrides = [f"cluster={spec}", "launch.nnodes=2", "launch.nproc_per_node=1", f"name={name}"]
    overrides += ["train.steps=150", "train.evaluate_every_steps=150", "register_model.model_name=ended"]
    command = [sys.executable, "-m", "flows.cli", "run", project.config, *overrides]
    environment = {**project.environment, "SLURM_CONF": str(slurm.conf)}
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL) as run:
        slurm.until(lambda: len(project.metrics(name)) > 12, "the job trains")
        run.send_signal(number)
        assert run.wait() == (130 if number == signal.SIGINT else -number)
    slurm.until(lambda: slurm.call("squeue", "--noheader") == "", "no job is left")
    slurm.until(lambda: slurm.left() == [], "nothing is left on the nodes")
    assert slurm.jobs()[-1]["JobState"] == "CANCELLED"
    assert (project.runs / name / "reservation.json").exists() is (number == signal.SIGKILL)
    ended = subprocess.run(command, env=environment, capture_output=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert [line["step"] for line in project.metrics(name)] == list(range(1, 151))
    assert [job["JobState"] for job in slurm.jobs()] == ["CANCELLED", "COMPLETED"]
    assert not (project.runs / name / "reservation.json").exists()
