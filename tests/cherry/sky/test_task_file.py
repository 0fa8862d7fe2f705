"""The SkyPilot task: its text, what it refuses, and its script on two hosts that share nothing but an object store."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from base import storage
from base.config import validate
from base.errors import ConfigError
from cherry.cluster import ClusterSpec
from cherry.job_config import JobConfig
from cherry.sky.start import STARTS_FILE
from cherry.sky.task_file import render
from tests.project import free_port
from tests.training_job import environment_of_programs

GOLDEN = Path(__file__).parent / "task.yaml"
SPEC = {
    "provider": "sky",
    "nodes": 4,
    "gpus_per_node": 8,
    "gpu": "A100",
    "communication": {"environment": {"NCCL_DEBUG": "WARN"}},
    "sky": {
        "infra": "aws/us-east-1",
        "use_spot": True,
        "image": "docker:registry/cherry:1",
        "disk_size": 512,
        "resources": {"network_tier": "best"},
        "setup": ["pip install cherry-framework", "export GREETING='hello world'"],
        "python": "/opt/cherry/bin/python",
        "data": "s3://bucket/mini/data",
        "secrets": ["HF_TOKEN"],
        "starts": 7,
        "max_restarts_on_errors": 1,
    },
}
PLACES = ("checkpoint.directory=s3://bucket/mini/checkpoints", "data.source=s3://bucket/text")
TWO_HOSTS = ("launch.nnodes=2", "launch.nproc_per_node=8", "train.batch_size=16", *PLACES)


def spec(given=None):
    return validate(SPEC if given is None else {"provider": "sky", **given}, ClusterSpec, origin="sky.yaml")


def config_in(script):
    """(script with a placeholder for the job's config, that config)."""
    before, _, rest = script.partition("<< 'END_OF_JOB_CONFIG'\n")
    config, _, after = rest.partition("END_OF_JOB_CONFIG\n")
    read = validate(yaml.safe_load(config), JobConfig, origin="job.yaml")
    return f"{before}<< 'END_OF_JOB_CONFIG'\nCONFIG\nEND_OF_JOB_CONFIG\n{after}", read


def test_a_task_has_every_option_and_carries_the_jobs_config(mini):
    config = mini(*TWO_HOSTS)
    text = render(config, spec(), origin="sky.yaml")
    task = yaml.safe_load(text)
    script, carried = config_in(task.pop("run"))
    assert carried == config
    assert {**task, "run": script} == yaml.safe_load(GOLDEN.read_text())
    checked = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True, check=False)
    assert (checked.returncode, checked.stderr) == (0, "")
    assert "run: |\n" in text  # a person can read it


def test_what_is_not_set_is_left_to_skypilot(mini):
    task = yaml.safe_load(render(mini(*PLACES, "launch.nproc_per_node=2", "train.batch_size=4"), spec({}), origin="f"))
    assert task.keys() == {"name", "num_nodes", "resources", "envs", "run"}
    assert task["resources"].keys() == {"job_recovery"}
    assert "--nproc_per_node=2 " in task["run"]


@pytest.mark.parametrize(
    ("given", "overrides", "told"),
    [
        ({}, (), ["checkpoint.directory: must be a URI of an object store"]),
        ({}, ("checkpoint.directory=/shared/checkpoints",), ["checkpoint.directory: must be a URI of an object store"]),
        ({}, ("checkpoint.directory=file:///shared/c",), ["checkpoint.directory: must be a URI of an object store"]),
        ({}, (*PLACES, "init_from=weights"), ["init_from: must be a URI of an object store (got 'weights')"]),
        ({}, (*PLACES, "data.source=text"), ["data.source: must be a URI of an object store, unless sky.data of f is"]),
        ({}, (*PLACES, "data.tokenizer=t.json"), ["data.tokenizer: must be a URI of an object store, unless sky.data"]),
        ({"nodes": 2}, (*TWO_HOSTS,), ["sky.data of f: must name the run's prepared data in a bucket"]),
        ({"nodes": 1}, (*TWO_HOSTS,), ["launch.nnodes: cluster 'f' has 1 nodes (got 2)"]),
        (
            {"gpu": "H100", "gpus_per_node": 4},
            ("launch.nproc_per_node=8", "train.batch_size=8"),
            ["launch.nproc_per_node: cluster 'f' has 4 GPUs a node (got 8)", "checkpoint.directory: "],
        ),
    ],
)
def test_what_the_hosts_would_not_have_is_refused(mini, given, overrides, told):
    with pytest.raises(ConfigError) as caught:
        render(mini(*overrides), spec(given), origin="f")
    assert all(f"\n  {line}" in str(caught.value) for line in told), caught.value


def start(script, home, rank, hosts):
    """One host's start of the task's script, as SkyPilot makes it."""
    variables = {
        "HOME": str(home),
        "SKYPILOT_TASK_ID": "sky-managed-2026-mini-1",
        "SKYPILOT_NODE_RANK": str(rank),
        "SKYPILOT_NUM_NODES": str(hosts),
        "SKYPILOT_NODE_IPS": "\n".join(["127.0.0.1"] * hosts),
    }
    return subprocess.Popen(
        ["bash", "-c", script],
        env={**environment_of_programs(), **variables},
        cwd=home,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def program(module, *flags):
    """Run a program of this project to its end."""
    command = [sys.executable, "-m", module, *flags]
    ended = subprocess.run(command, env=environment_of_programs(), capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr


@pytest.mark.long
def test_new_hosts_go_on_where_the_lost_ones_were_and_the_weights_come_back(mini, job_config, text, s3, tmp_path):
    given = {
        "nodes": 2,
        "communication": {"interface": "lo"},
        "sky": {"python": sys.executable, "data": "s3://bucket/mini/data", "starts": 2},
    }
    here = tmp_path / "run"
    program("cherry.sky.prepare", f"--config={job_config}", f"--run_dir={here}", f"--set={text}")
    said = {}
    homes = [tmp_path / f"host-{rank}" for rank in (0, 1)]
    for life, steps in (("first", 2), ("second", 4)):
        overrides = ("launch.nnodes=2", "train.warmup_steps=1", f"train.steps={steps}", "checkpoint.every_steps=2")
        places = (text, f"checkpoint.directory={s3}", f"launch.master_port={free_port()}")
        config = mini(*overrides, *places)
        script = yaml.safe_load(render(config, spec(given), origin="f"))["run"]
        for home in homes:
            shutil.rmtree(home, ignore_errors=True)  # with the host that was lost
            # As the task's file_mounts do.
            shutil.copytree(here / "data", home / "cherry" / config.name / "data")
        hosts = [start(script, home, rank, 2) for rank, home in enumerate(homes)]
        said[life] = [host.communicate()[0] for host in hosts]
        assert [host.returncode for host in hosts] == [0, 0], said[life]
    assert "start 1 since the beginning" in said["first"][0]
    assert f"start 1 since {s3}/step_2" in said["second"][0]
    assert "step 4/4" in said["second"][0] and "step 1/4" not in said["second"][0]
    program("cherry.export", f"--run_dir={here}", f"--checkpoint={s3}/step_4")
    assert storage.is_committed(str(here / "export"))
    assert storage.read_json(f"{s3}/{STARTS_FILE}")["newest"] == f"{s3}/step_2"
    network = json.loads(yaml.safe_load(render(config, spec(given), origin="f"))["envs"]["CHERRY_NETWORK"])
    assert network == {"interface": "lo"}
