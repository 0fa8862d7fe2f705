"""A provider of another package under the whole flow: two hosts taken, trained on and given back, also on a failure."""

import json
import os
import socket
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow
SPEC = "kind: nodes\nprovider: two-hosts\ngpu: H100\nnodes: 2\nhosts: [127.0.0.1, 127.0.0.2]\n"


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
    ended = cherry("name=unpaired", "train.steps=6", "init_from=/nowhere/weights")
    assert ended.returncode == 12, ended.stdout + ended.stderr
    assert "/nowhere/weights" in ended.stdout + ended.stderr
    assert calls(project, "unpaired") == ["acquire", "release"]
    assert not (project.runs / "unpaired" / "reservation.json").exists()
    assert not project.processes("unpaired")
