"""Plans of the shipped configs on the shipped clusters: what fits, how fast, and what costs more memory or time."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from base.config import load
from cherry.cluster import read_cluster
from cherry.hardware import GPUS
from cherry.planner.memory import memory_of
from cherry.planner.plan import make_plan
from cherry.planner.search import search
from cherry.planner.step_time import step_time
from cherry.planner.workload import Workload
from tasks.run_config import RunConfig
from tests.cherry.planner.workloads import ROOT, plan_for, released

CLUSTERS = ROOT / "configs" / "clusters"
HELD_AGAINST_SEARCH = ("h100-256", "h100-512", "h100-1024")
"""For the others the configuration's layout fits, and is not the fastest."""


def recommended() -> list[tuple[str, list[str]]]:
    """Cluster and overrides of every plan that a comment in a cluster's file names."""
    found = []
    for path in sorted(CLUSTERS.glob("*-*.yaml")):
        comments = re.sub(r" *\\\n# *", " ", path.read_text())
        commands = re.findall(r"^# cherry plan (configs/671b.yaml) --cluster (\S+)(.*)$", comments, re.MULTILINE)
        assert commands, path
        for _, cluster, overrides in commands:
            assert cluster == f"configs/clusters/{path.name}"
            found.append((path.stem, overrides.split()))
    return found


def test_a_checkpoint_of_the_671b_release_is_8_terabytes() -> None:
    overrides = ["model.num_nextn_predict_layers=0", "train.mtp_loss_weight=0.0"]
    assert plan_for("h100-256", *overrides).run.checkpoint_bytes / 1e12 == pytest.approx(8.05, abs=0.005)


@pytest.mark.parametrize(("cluster", "overrides"), recommended())
def test_the_671b_config_fits_on_the_clusters_that_are_shipped(cluster: str, overrides: list[str]) -> None:
    plan = plan_for(cluster, *overrides)
    assert plan.fits, plan.why_not()
    assert plan.work.ranks == plan.cluster.gpus
    assert 0.05 < plan.step.mfu(causal=True) < 0.5
    assert plan.run.cost is not None
    best = next(layout for layout in search(plan) if "train.precision" not in layout.changes)
    assert plan.step.tokens_per_s_gpu > 0.98 * best.tokens_per_s_gpu or cluster not in HELD_AGAINST_SEARCH


@pytest.mark.parametrize(
    ("cluster", "wide", "same", "speeds"),
    [
        ("h100-512", ["launch.nnodes=64", "train.batch_size=1024"], ["launch.nnodes=64"], (790, 652, 638)),
        (
            "h100-1024",
            ["launch.nnodes=128", "train.batch_size=2048"],
            ["launch.nnodes=128", "train.batch_size=1024"],
            (790, 638, 582),
        ),
    ],
)
def test_more_gpus_want_a_larger_batch_or_copies(
    cluster: str, wide: list[str], same: list[str], speeds: tuple[int, int, int]
) -> None:
    """The figures in the comments of the clusters' files."""
    copies = {"h100-512": 2, "h100-1024": 4}[cluster]
    plans = [wide, [*same, f"parallel.replicate={copies}"], same]
    comments = (CLUSTERS / f"{cluster}.yaml").read_text()
    for overrides, speed in zip(plans, speeds, strict=True):
        assert plan_for(cluster, *overrides).step.tokens_per_s_gpu == pytest.approx(speed, abs=0.6)
        assert str(speed) in comments


def test_the_demo_fits_on_a_laptop() -> None:
    laptop = read_cluster(str(ROOT / "configs" / "clusters" / "laptop.yaml"))
    assert make_plan(load(ROOT / "configs" / "tiny.yaml", RunConfig), laptop).fits


def test_more_of_anything_needs_more_memory_or_time() -> None:
    def peak(work: Workload) -> int:
        return memory_of(work)[0].total

    base = released(micro_sequences=2)
    assert peak(replace(base, recompute="none")) > peak(base)
    assert peak(replace(base, micro_sequences=8)) > peak(base)
    assert peak(replace(base, shard=8)) < peak(base)
    assert peak(replace(base, assumed_imbalance=4.0)) > peak(base)
    assert peak(replace(base, kept_share=1.0)) > peak(replace(base, kept_share=1 / 8)) > peak(base)
    assert step_time(replace(base, recompute="none")).total < step_time(base).total
    assert step_time(replace(base, sequence_length=8192)).total > 2 * step_time(base).total
    assert step_time(replace(base, kept_share=1.0)).collectives["all-gather, backward"] == 0
    assert step_time(base).collectives["all-gather, backward"] > 0
    assert step_time(replace(base, gpu=GPUS["B200"])).total < step_time(base).total
    assert step_time(replace(base, assumed_imbalance=1.5)).total > step_time(base).total


def test_the_communication_section_is_in_the_plan() -> None:
    plain = plan_for("h100-256")
    changed = plan_for("h100-256", "communication.buffer_size=16MiB", "communication.max_channels=8")
    assert changed.worst.components["communication"] == 2 * plain.worst.components["communication"]
    thin = plan_for("h100-256", "communication.reduce_dtype=bf16")
    assert thin.step.collectives["reduce-scatter"] < 0.6 * plain.step.collectives["reduce-scatter"]
    copies = ["parallel.replicate=4", "communication.replicate=int8"]
    small, wide = (plan_for("b200-256", *copies[:count]).step.collectives["all-reduce of replicas"] for count in (2, 1))
    assert small < 0.3 * wide
