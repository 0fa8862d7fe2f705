"""The command line of a job on a cluster, and what its launchers get on each host."""

import json

import pytest

from base.errors import ConfigError, MissingFileError
from cherry.cluster import NodeSpec
from cherry.remote.job import parse_job

SPEC = """\
nodes: [{host: node1, gpus: [0, 1]}, {host: node2, gpus: [2, 3]}, {host: node3, gpus: [0, 1]}]
communication: {buffer_size: 256MB, environment: {NCCL_IB_HCA: mlx5}}
recovery: {spares: [{host: node9, gpus: [0, 1]}], min_nodes: 1}
"""


@pytest.fixture
def spec(tmp_path):
    path = tmp_path / "cluster.yaml"
    path.write_text(SPEC)
    return str(path)


def test_all_nodes_and_the_gpus_that_they_list_are_the_default(spec):
    job = parse_job([f"--cluster={spec}", "train.py", "--config", "tiny", "--run_dir=runs/x", "--steps=3"])
    assert (job.nodes, job.ranks_per_node, job.run_directory) == (3, 2, "runs/x")
    assert [node.host for node in job.candidates] == ["node1", "node2", "node3", "node9"]
    assert job.launcher_arguments(2, 1, "10.0.0.1", 4711) == [
        *("--nproc_per_node=2", "--nnodes=2", "--node_rank=1", "--master_addr=10.0.0.1", "--master_port=4711"),
        *("--max-restarts=0", "train.py", "--config", "tiny", "--run_dir=runs/x", "--steps=3"),
    ]
    assert parse_job(["--cluster", spec, "--nnodes=2", "--nproc-per-node=1", "-m", "cherry.rank_main"]).program == (
        *("-m", "cherry.rank_main"),
    )


def test_a_host_s_environment_has_its_gpus_its_network_and_credentials_but_no_paths(spec, monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("PYTHONPATH", "/somewhere")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    job = parse_job([f"--cluster={spec}", "train.py"])
    environment = job.environment(job.spec.named[1], "eth0")
    assert environment["CUDA_VISIBLE_DEVICES"] == "2,3"
    assert environment["AWS_ACCESS_KEY_ID"] == "key"
    assert not {"PYTHONPATH", "PATH", "HOME"} & environment.keys()
    assert json.loads(environment["CHERRY_NETWORK"]) == {
        "buffer_size": 256_000_000,
        "interface": "eth0",
        "environment": {"NCCL_IB_HCA": "mlx5"},
    }
    assert "CUDA_VISIBLE_DEVICES" not in job.environment(NodeSpec(host="node4"), None)


def test_hosts_that_share_nothing_have_run_directories_of_their_own(tmp_path):
    spec = tmp_path / "cluster.yaml"
    spec.write_text("nodes: [{host: node1}, {host: node2}]\nssh: {runs_directory: /scratch/cherry}\n")
    run = str(tmp_path / "runs" / "tiny")
    flags = ["--config", f"{run}/config.yaml", "--set", f"data.source={run}/text", "--steps=3"]
    job = parse_job([f"--cluster={spec}", "-m", "cherry.rank_main", *flags, f"--run_dir={run}/"])
    there = job.host_directory
    assert there.startswith("/scratch/cherry/tiny-")
    assert job.launcher_arguments(2, 0, "10.0.0.1", 4711)[6:] == [
        *("-m", "cherry.rank_main", "--config", f"{there}/config.yaml"),
        *("--set", f"data.source={run}/text", "--steps=3", f"--run_dir={there}/"),
    ]
    other = parse_job([f"--cluster={spec}", "train.py", f"--run_dir={tmp_path / 'mine' / 'tiny'}"])
    assert other.host_directory != there, "another run of the same name"
    relative = parse_job([f"--cluster={spec}", "train.py", "--run_dir", "runs/x", "--config=runs/x/config.yaml"])
    assert relative.launcher_arguments(2, 0, "10.0.0.1", 4711)[6:] == [
        *("train.py", "--run_dir", relative.host_directory, f"--config={relative.host_directory}/config.yaml")
    ]
    assert parse_job([f"--cluster={spec}", "train.py"]).host_directory is None


def test_fewer_nodes_fit_only_where_the_configuration_allows_it(spec, job_config):
    flags = [f"--cluster={spec}", "--nproc_per_node=1", "train.py", f"--config={job_config}", "--batch_size=6"]
    job = parse_job(flags)
    assert [job.fits(nodes) for nodes in (1, 2, 3)] == [True, True, True]
    assert not parse_job([*flags, "--batch_size=4"]).fits(3)
    assert parse_job([f"--cluster={spec}", "my_program.py"]).fits(5)


@pytest.mark.parametrize(
    ("flags", "error", "words"),
    [
        (["--nnodes=4"], ConfigError, "--nnodes must be from 1 to 3, the cluster's nodes"),
        (["--nproc_per_node=0"], ConfigError, "--nproc_per_node must be at least 1"),
        (["--master_addr=node1"], ConfigError, "unrecognized arguments: --master_addr=node1"),
        (["--cluster=elsewhere.yaml"], MissingFileError, "elsewhere.yaml"),
        (["--cluster=h100-256"], ConfigError, "h100-256: names no hosts to start on"),
    ],
)
def test_a_wrong_command_line_is_refused(spec, flags, error, words):
    with pytest.raises(error, match=words):
        parse_job([f"--cluster={spec}", *flags, "train.py"])
