"""Cluster specs: the shipped files, this machine, and specs that break a rule."""

from __future__ import annotations

from pathlib import Path

import pytest

from base.config import dump, validate
from base.errors import ConfigError, MissingFileError
from cherry.cluster import ClusterSpec, SlurmConfig, read_cluster
from cherry.hardware import GPUS

CLUSTERS = Path(__file__).resolve().parents[2] / "configs" / "clusters"


@pytest.mark.parametrize(
    ("spec", "problem"),
    [
        (
            {"kind": "nodes", "gpu": "H1000", "nodes": 2},
            "gpu: unknown hardware; known are H100, ",
        ),
        ({"kind": "nodes", "nodes": 2}, "gpu: is required with kind nodes"),
        ({"kind": "nodes", "gpu": "H100", "price_per_gpu_hour": -1.0}, "price_per_gpu_hour: input should be greater"),
        (
            {"nodes": [{"host": "a"}, {"host": "a"}]},
            "nodes: each host must be named once, as a node or a spare, and a is",
        ),
        (
            {"nodes": [{"host": "a"}], "recovery": {"spares": [{"host": "a"}]}},
            "nodes: each host must be named once, as a node or a spare, and a is",
        ),
        ({"nodes": []}, "nodes: must name at least one host"),
        ({"nodes": [{"host": "me@a"}]}, "nodes.0.host: must be a host's name or address; user and port"),
        ({"nodes": [{"host": "a", "gpu": [0]}]}, "nodes.0.gpu: unknown key, did you mean gpus?"),
        ({"nodes": [{"host": "a", "gpus": [0, 0]}]}, "nodes.0.gpus: must name each GPU once"),
        (
            {"nodes": [{"host": "a", "gpus": [0, 1]}, {"host": "b", "gpus": [0]}]},
            "nodes: must list 2 GPUs for each node, as all nodes have equally many ranks: b differs",
        ),
        ({"nodes": [{"host": "a", "gpus": [0]}], "gpus_per_node": 2}, "nodes: must list 2 GPUs for each node"),
        ({"nodes": [{"host": "a"}], "recovery": {"min_nodes": 2}}, "recovery.min_nodes: must be at most the number"),
        ({"gpu": "H100", "nodes": 4, "ssh": {"user": "me"}}, "ssh: is for nodes that are named"),
        ({"nodes": [{"host": "a"}], "ssh": {"runs_directory": "~/a"}}, "ssh.runs_directory: must be an absolute path"),
        ({"gpu": "H100", "nodes": 4, "provider": "ssh"}, "nodes: must name the hosts with provider ssh"),
        ({"provider": "slurm", "nodes": [{"host": "a"}]}, "nodes: must be a number with provider slurm"),
        ({"provider": "slurm", "recovery": {"attempts": 2}}, "recovery: is for nodes that are named"),
        ({"gpu": "H100", "slurm": {"partition": "a"}}, "slurm: is for provider slurm (got None)"),
        ({"provider": "slurm", "slurm": {"time": "1h"}}, "slurm.time: must be a time as sbatch takes it: MINUTES, "),
        ({"provider": "slurm", "slurm": {"time": "3"}}, "slurm.time: must be longer than slurm.warning_s (180 s)"),
        ({"provider": "slurm", "slurm": {"partition": "a b"}}, "slurm.partition: must be a name as sbatch takes it"),
        ({"provider": "slurm", "slurm": {"options": ["-c 4"]}}, "slurm.options.0: must be one long option of sbatch"),
        ({"provider": "slurm", "slurm": {"options": ["--time=4"]}}, "slurm.options: must not hold what the script or"),
        ({"provider": "slurm", "slurm": {"setup": ["a\nb"]}}, "slurm.setup.0: must be one line of shell"),
        ({"provider": "sky", "nodes": [{"host": "a"}]}, "nodes: must be a number with provider sky"),
        ({"provider": "sky", "gpus_per_node": 8}, "sky.accelerator: must be SkyPilot's name of the GPUs"),
        ({"provider": "sky", "gpu": "H100 PCIe"}, "sky.accelerator: must be SkyPilot's name of the GPUs"),
        ({"provider": "sky", "sky": {"job_recovery": {}}}, "sky.job_recovery: unknown key"),
        ({"provider": "sky", "sky": {"resources": {"job_recovery": "a"}}}, "sky.resources: must not hold what the"),
        ({"provider": "sky", "sky": {"infra": "slurm/cluster"}}, "sky.infra: must not be slurm: write a cluster file"),
        ({"provider": "sky", "sky": {"data": "abfs://a/b"}}, "sky.data: must be a folder in a bucket, like s3://"),
        (
            {"provider": "sky", "sky": {"secrets": ["A=b"]}},
            "sky.secrets.0: must be the name of an environment variable",
        ),
        ({"provider": "sky", "sky": {"python": "~/venv/bin/python"}}, "sky.python: must be a program's name or path"),
        ({"gpu": "H100", "sky": {"infra": "aws"}}, "sky: is for provider sky (got None)"),
        ({"nodes": ["node1"]}, "nodes.0: must be a mapping, like {host: node1} (got 'node1')"),
        ({"nodes": "node1"}, "nodes: must be a number of nodes above 0, or a list of them, like [{host: node1}, "),
        ({"nodes": {"host": "node1"}}, "nodes: must be a number of nodes above 0, or a list of them, like [{host: "),
        ({"nodes": 0}, "nodes: must be a number of nodes above 0, or a list of them, like [{host: node1}, "),
        (
            {"nodes": [{"host": "a"}], "recovery": {"spares": ["b"]}},
            "recovery.spares.0: must be a mapping, like {host: node1} (got 'b')",
        ),
        ({"provider": "Slurm", "nodes": 2, "slurm": {"qos": "x"}}, "provider: did you mean slurm? Names of providers"),
        ({"provider": "SSH", "nodes": [{"host": "a"}]}, "provider: did you mean ssh?"),
        ({"kind": "local", "nodes": 2}, "nodes: must be 1 with kind local"),
        ({"kind": "nodes", "gpu": "H100", "assumed_imbalance": 0.5}, "assumed_imbalance: input should be greater"),
    ],
)
def test_a_spec_that_breaks_a_rule_is_refused_with_its_key(spec: dict[str, object], problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        validate(spec, ClusterSpec, origin="spec.yaml")
    assert f"spec.yaml: 1 problem\n  {problem}" in str(caught.value)


@pytest.mark.parametrize("path", sorted(CLUSTERS.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_shipped_spec_is_what_its_file_s_name_says(path: Path) -> None:
    spec = read_cluster(str(path))
    gpu, _, gpus = path.stem.partition("-")
    if spec.provider is not None:
        assert spec.provider == path.stem
    elif not gpus:
        assert (spec.kind, spec.gpus) == ("local", 1)
    else:
        assert (spec.kind, spec.hardware, spec.gpus) == ("nodes", gpu.upper(), int(gpus))
    assert spec.hardware in GPUS


def test_named_nodes_are_counted_with_the_gpus_that_they_list(tmp_path: Path) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text(
        "nodes:\n  - {host: node1, gpus: [0, 1, 2, 3]}\n  - {host: node2, gpus: [4, 5, 6, 7]}\n"
        "communication: {backend: nccl, buffer_size: 256MB}\n"
    )
    spec = read_cluster(str(path))
    assert [(node.host, node.gpus) for node in spec.named] == [("node1", (0, 1, 2, 3)), ("node2", (4, 5, 6, 7))]
    assert (spec.kind, spec.node_count, spec.node_gpus, spec.gpus) == ("nodes", 2, 4, 8)
    assert spec.communication.given() == {"backend": "nccl", "buffer_size": 256_000_000}
    path.write_text(dump(spec))
    assert read_cluster(str(path)) == spec


@pytest.mark.parametrize(
    ("time", "seconds"),
    [("5", 300), ("3:30", 210), ("1:00:00", 3600), ("2-00", 172_800), ("1-02:30", 95_400), ("0-00:10:05", 605)],
)
def test_slurms_time_limits_are_read_as_sbatch_reads_them(time: str, seconds: int) -> None:
    assert SlurmConfig(time=time).time_s == seconds


def test_local_is_this_machine() -> None:
    assert read_cluster("local") == ClusterSpec(kind="local")
    assert ClusterSpec(kind="local").hardware == "laptop"
    with pytest.raises(MissingFileError, match=r"elsewhere\.yaml"):
        read_cluster("elsewhere.yaml")


def test_what_is_no_cluster_file_is_told_with_those_that_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "corpus").mkdir()
    (tmp_path / "prefect.yaml").touch()
    (tmp_path / "mine.yaml").write_text("name: mine\nmodel: {preset: tiny}\n")
    with pytest.raises(MissingFileError) as caught:
        read_cluster("corpus")
    assert str(caught.value).startswith("corpus is a folder, and a cluster is a YAML file. Give `local`, the path of")
    assert "clusters/laptop.yaml" in str(caught.value) and "tiny.yaml" not in str(caught.value)
    (tmp_path / "corpus" / "pair.yaml").touch()
    with pytest.raises(MissingFileError, match=r"a cluster is a YAML file\. Did you mean corpus/pair\.yaml\?"):
        read_cluster("corpus")
    with pytest.raises(MissingFileError, match=r"no cluster file at h100\. Did you mean configs/clusters/h100-"):
        read_cluster("h100")
    with pytest.raises(
        ConfigError, match=r"mine\.yaml: is no cluster file: it has model, as the config of a run\. Give"
    ):
        read_cluster("mine.yaml")
