"""Workload of a plan: its process groups on nodes, and jobs that a cluster cannot run."""

from __future__ import annotations

import pytest

from base.config import load
from base.errors import ConfigError
from cherry.cluster import ClusterSpec, read_cluster
from cherry.hardware import GPUS
from cherry.job_config import ParallelConfig
from cherry.planner.workload import cluster_problems, workload_of
from tasks.run_config import RunConfig
from tests.cherry.planner.workloads import ROOT, released


def test_groups_know_how_many_of_them_share_a_node() -> None:
    work = released(replicate=2, shard=2, context=2, expert=32)
    groups = {
        "dense": (work.dense_group, 128, 8),
        "expert": (work.expert_group, 32, 8),
        "experts' shards": (work.expert_shard_group, 4, 1),
        "replicas": (work.replicate_group, 2, 1),
    }
    for name, (group, ranks, on_node) in groups.items():
        assert (group.ranks, group.on_node) == (ranks, on_node), name
    small = released(shard=64, expert=4)
    assert (small.expert_group.nodes, small.expert_shard_group.on_node) == (1, 2)


@pytest.mark.parametrize(
    ("overrides", "cluster", "problem"),
    [
        (
            [],
            ClusterSpec(kind="nodes", gpu="H100", nodes=16, gpus_per_node=8),
            "launch.nnodes: the cluster has 16",
        ),
        ([], ClusterSpec(kind="nodes", gpu="H100", nodes=33, gpus_per_node=8), "must divide the cluster's 264 GPUs"),
        ([], ClusterSpec(kind="local"), "launch.nnodes: the cluster is one machine; name another's spec: --cluster"),
        ([], ClusterSpec(kind="local"), "train.precision: laptop computes in fp32"),
    ],
)
def test_a_job_that_does_not_go_on_a_cluster_is_refused(
    overrides: list[str], cluster: ClusterSpec, problem: str
) -> None:
    config = load(ROOT / "configs" / "671b.yaml", RunConfig, overrides)
    with pytest.raises(ConfigError, match="the job does not fit the cluster") as caught:
        workload_of(config, cluster)
    assert problem in str(caught.value)


def test_the_planner_and_the_engine_name_the_same_axes() -> None:
    assert {"replicate", "shard", "context", "expert"} <= set(ParallelConfig.model_fields)


@pytest.mark.parametrize(("gpu", "goes"), [("H100", True), ("H800", True), ("H200", True), ("B200", False)])
def test_a_job_in_fp8_goes_on_gpus_that_the_engine_has_kernels_for(gpu: str, goes: bool) -> None:
    config = load(ROOT / "configs" / "671b.yaml", RunConfig)
    config = config.model_copy(update={"train": config.train.model_copy(update={"precision": "fp8"})})
    cluster = read_cluster(str(ROOT / "configs" / "clusters" / "h100-256.yaml"))
    problems = [str(problem) for problem in cluster_problems(config, cluster, GPUS[gpu])]
    assert problems == ([] if goes else ["train.precision: B200 computes in fp32, bf16 (got 'fp8')"])
