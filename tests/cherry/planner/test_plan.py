"""The plan's arithmetic against published values, what fits on real clusters, and what is refused."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from base.config import load, validate
from base.errors import ConfigError
from cherry.cluster import ClusterSpec, read_cluster
from cherry.hardware import GIB, GPUS, PROCESS_BYTES
from cherry.job_config import LoraConfig, ParallelConfig
from cherry.lora import add_adapters
from cherry.planner.activations import boundary_bytes, layer_activations
from cherry.planner.links import all_to_all_seconds, ring_seconds
from cherry.planner.memory import memory_of
from cherry.planner.plan import Plan, make_plan
from cherry.planner.search import nearest_that_fit, search
from cherry.planner.step_time import step_time
from cherry.planner.units import EXPERTS, network_of, whole_network
from cherry.planner.workload import Workload, workload_of
from model.model_config import PRESETS, ModelConfig
from model.transformer import DeepseekV3
from tasks.run_config import RunConfig

ROOT = Path(__file__).resolve().parents[3]
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


def plan_for(cluster: str, *overrides: str) -> Plan:
    config = load(ROOT / "configs" / "671b.yaml", RunConfig, list(overrides))
    return make_plan(config, read_cluster(str(ROOT / "configs" / "clusters" / f"{cluster}.yaml")))


def released(**keys: object) -> Workload:
    """The 671B model without its MTP module on 256 H100."""
    model = ModelConfig.model_validate({**PRESETS["671b"], "num_nextn_predict_layers": 0})
    known: dict[str, object] = {
        "model": model,
        "gpu": GPUS["H100"],
        "gpus_per_node": 8,
        "replicate": 1,
        "shard": 4,
        "context": 1,
        "expert": 64,
        "micro_sequences": 1,
        "accumulation": 1,
        "sequence_length": 4096,
        "precision": "bf16",
        "recompute": "full",
    }
    return Workload(**{**known, **keys})  # type: ignore[arg-type]


def test_units_hold_every_parameter_of_the_model() -> None:
    for preset in PRESETS.values():
        config = ModelConfig.model_validate(preset)
        biases = config.n_routed_experts * (config.n_moe_layers + config.num_nextn_predict_layers)
        biases = biases if config.scoring_func == "sigmoid" else 0  # buffers, which the published counts include
        network = network_of(released(model=config, shard=1, expert=1))
        assert network.total("elements") + biases == config.parameters(with_mtp=True)
        for expert in (2, 4):
            dealt = network_of(released(model=config, shard=1, expert=expert))
            (own,) = [unit for unit in dealt.mixture.units if unit.name == EXPERTS]
            elsewhere = (expert - 1) * dealt.mixture_layers * own.elements
            assert dealt.total("elements") + elsewhere == network.total("elements")


@pytest.mark.parametrize("targets", [None, ("q_b_proj", "shared_down")])
def test_adapters_alone_are_trained(targets: tuple[str, ...] | None) -> None:
    config, lora = ModelConfig.model_validate(PRESETS["tiny"]), LoraConfig(rank=4, targets=targets)
    with torch.device("meta"):
        model: nn.Module = DeepseekV3(config)
    add_adapters(model, lora)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    network = network_of(released(model=config, shard=1, expert=1, lora=lora))
    assert network.total("trained_elements") == trained
    assert network.total("elements") == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(("ranks", "gigabytes"), [(256, 41.9), (512, 21.0), (1024, 10.5)])
def test_states_of_the_671b_release_are_what_their_bytes_give(ranks: int, gigabytes: float) -> None:
    """16 bytes a parameter; 8.05 TB of them in a checkpoint."""
    components = memory_of(released(shard=ranks // 64))[0].stages["optimizer"]
    held = sum(components[name] for name in ("parameters", "gradients", "optimizer states"))
    assert held / 1e9 == pytest.approx(gigabytes, rel=0.005)
    thin = memory_of(released(shard=ranks // 64, moment_bytes=2))[0].stages["optimizer"]
    assert 2 * thin["optimizer states"] == components["optimizer states"]


@pytest.mark.parametrize(
    ("preset", "experts", "share", "terabytes"),
    [("671b", 653_908_770_816, 0.9745, 1.342), ("16b", 14_394_851_328, 0.9165, 0.0314)],
)
def test_routed_experts_are_most_of_the_weights(preset: str, experts: int, share: float, terabytes: float) -> None:
    model = ModelConfig.model_validate({**PRESETS[preset], "num_nextn_predict_layers": 0})
    network = network_of(released(model=model, shard=1, expert=8))
    dealt = next(unit for unit in network.mixture.units if unit.name == EXPERTS)
    assert network.mixture_layers * 8 * dealt.elements == experts
    whole = whole_network(model, None).total("elements")
    assert experts / whole == pytest.approx(share, abs=5e-5)
    assert 2 * whole / 1e12 == pytest.approx(terabytes, rel=0.001)


def test_a_checkpoint_of_the_671b_release_is_8_terabytes() -> None:
    overrides = ["model.num_nextn_predict_layers=0", "train.mtp_loss_weight=0.0"]
    assert plan_for("h100-256", *overrides).run.checkpoint_bytes / 1e12 == pytest.approx(8.05, abs=0.005)


def test_one_mixture_layer_gathered_whole_is_23_gigabytes() -> None:
    network = network_of(released(shard=256, expert=1))
    assert 2 * network.mixture.elements / 1e9 == pytest.approx(23.0, abs=0.05)


@pytest.mark.parametrize(("expert", "terabytes"), [(1, 5.4), (64, 0.22)])
def test_what_a_step_gathers_and_reduces_is_what_pure_fsdp_fails_by(expert: int, terabytes: float) -> None:
    """Gathered in bf16 for both passes, reduced in fp32."""
    network = network_of(released(shard=256 // expert, expert=expert))
    assert (2 + 2 + 4) * network.total("elements") / 1e12 == pytest.approx(terabytes, abs=0.05)


def test_activations_of_the_671b_release_are_those_of_the_published_arithmetic() -> None:
    """About 638 KB a token and layer with each routed row's activation and result, which this engine does not keep."""
    work = released()
    routed = 2 * 8 * (2048 + 7168)
    saved = layer_activations(work, moe=True, imbalance=1.0).saved
    assert saved / 4096 + routed == pytest.approx(638e3, rel=0.01)
    assert 61 * boundary_bytes(work) / 1e9 == pytest.approx(3.6, abs=0.05)


def test_mfu_is_told_in_both_conventions() -> None:
    step = step_time(released())
    for causal, gigaflops in ((True, 250.5), (False, 281.2)):
        assert step.mfu(causal=causal) * 989.4e12 / step.tokens_per_s_gpu / 1e9 == pytest.approx(gigaflops, abs=0.1)


@pytest.mark.parametrize(("cluster", "overrides"), recommended())
def test_the_671b_config_fits_on_the_clusters_that_are_shipped(cluster: str, overrides: list[str]) -> None:
    plan = plan_for(cluster, *overrides)
    assert plan.fits, plan.why_not()
    assert plan.work.ranks == plan.cluster.gpus
    assert 0.05 < plan.step.mfu(causal=True) < 0.5
    assert plan.run.cost is not None
    best = next(one for one in search(plan) if "train.precision" not in one.changes)
    assert plan.step.tokens_per_s_gpu > 0.98 * best.tokens_per_s_gpu or cluster not in HELD_AGAINST_SEARCH


@pytest.mark.parametrize(
    ("cluster", "wide", "same", "speeds"),
    [
        ("h100-512", ["launch.nnodes=64", "train.batch_size=1024"], ["launch.nnodes=64"], (813, 662, 638)),
        (
            "h100-1024",
            ["launch.nnodes=128", "train.batch_size=2048"],
            ["launch.nnodes=128", "train.batch_size=1024"],
            (813, 648, 582),
        ),
    ],
)
def test_more_gpus_want_a_larger_batch_or_copies(
    cluster: str, wide: list[str], same: list[str], speeds: tuple[int, int, int]
) -> None:
    """The figures that the clusters' files tell."""
    copies = {"h100-512": 2, "h100-1024": 4}[cluster]
    plans = [wide, [*same, f"parallel.replicate={copies}"], same]
    told = (CLUSTERS / f"{cluster}.yaml").read_text()
    for overrides, speed in zip(plans, speeds, strict=True):
        assert plan_for(cluster, *overrides).step.tokens_per_s_gpu == pytest.approx(speed, abs=0.6)
        assert str(speed) in told


def test_the_demo_fits_on_a_laptop() -> None:
    laptop = read_cluster(str(ROOT / "configs" / "clusters" / "laptop.yaml"))
    assert make_plan(load(ROOT / "configs" / "tiny.yaml", RunConfig), laptop).fits


def test_experts_that_nothing_deals_out_do_not_fit_and_the_nearest_change_deals_them_out() -> None:
    plan = plan_for("h100-256", "parallel.expert=1")
    assert not plan.fits
    assert "There is no room for gathered layers" in plan.why_not()
    nearest = nearest_that_fit(plan)
    assert {"parallel.expert": 64} in [one.changes for one in nearest]
    assert all(one.total_bytes <= plan.worst.usable for one in nearest)
    # The change as a person would write it leads to the very same plan.
    again = plan_for("h100-256", "parallel.expert=1", "parallel.expert=64")
    assert again.worst.total == next(one.total_bytes for one in nearest if one.changes == {"parallel.expert": 64})


def test_where_one_change_is_not_enough_two_are_named() -> None:
    plan = plan_for("h100-256", "parallel.expert=1", "train.activation_checkpointing=none")
    assert not plan.fits
    nearest = nearest_that_fit(plan)
    assert nearest
    assert all(len(one.changes) == 2 for one in nearest)


@pytest.mark.parametrize(
    ("name", "cluster_name", "overrides"),
    [
        ("671b", "h100-256", []),
        ("16b", "h100-512", ["launch.nnodes=64", "train.batch_size=3072", "train.gradient_accumulation_steps=6"]),
    ],
)
def test_a_search_ranks_layouts_that_the_configuration_takes(
    name: str, cluster_name: str, overrides: list[str]
) -> None:
    path = ROOT / "configs" / f"{name}.yaml"
    config = load(path, RunConfig, overrides)
    cluster = read_cluster(str(ROOT / "configs" / "clusters" / f"{cluster_name}.yaml"))
    found = search(make_plan(config, cluster))
    speeds = [one.tokens_per_s_gpu for one in found]
    assert speeds == sorted(speeds, reverse=True)
    own = next(one for one in found if not one.changes)
    assert own.tokens_per_s_gpu == make_plan(config, cluster).step.tokens_per_s_gpu
    for one in found[:: max(1, len(found) // 12)]:
        config = load(path, RunConfig, [*overrides, *one.overrides.split()])
        plan = make_plan(config, cluster)
        assert plan.fits
        assert plan.step.tokens_per_s_gpu == pytest.approx(one.tokens_per_s_gpu)
        assert plan.worst.total == one.total_bytes


def test_a_search_goes_over_every_key_that_a_layout_has() -> None:
    """Replicas as far as they fit, and every micro-batch that divides the batch."""
    overrides = ["launch.nnodes=64", "train.batch_size=3072", "train.gradient_accumulation_steps=6"]
    config = load(ROOT / "configs" / "16b.yaml", RunConfig, overrides)
    found = search(make_plan(config, read_cluster(str(ROOT / "configs" / "clusters" / "h100-512.yaml"))))
    values: dict[str, set[object]] = {}
    for one in found:
        for key, value in one.changes.items():
            values.setdefault(key, set()).add(value)
    assert {2, 4, 8, 16, 32} <= values["parallel.replicate"]
    assert values["parallel.expert"] == {1, 2, 4, 16, 32, 64}
    assert values["parallel.context"] == {2, 4, 8}
    assert {1, 2, 3} <= values["train.gradient_accumulation_steps"]
    assert values["train.activation_checkpointing"] == {"none"}
    assert "fp32" in values["train.precision"]


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


def test_what_the_communication_section_says_is_in_the_plan() -> None:
    plain = plan_for("h100-256")
    told = plan_for("h100-256", "communication.buffer_size=16MiB", "communication.max_channels=8")
    assert told.worst.components["communication"] == 2 * plain.worst.components["communication"]
    thin = plan_for("h100-256", "communication.reduce_dtype=bf16")
    assert thin.step.collectives["reduce-scatter"] < 0.6 * plain.step.collectives["reduce-scatter"]
    copies = ["parallel.replicate=4", "communication.replicate=int8"]
    small, wide = (plan_for("b200-256", *copies[:count]).step.collectives["all-reduce of replicas"] for count in (2, 1))
    assert small < 0.3 * wide


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


def test_collectives_take_the_time_of_their_narrowest_link() -> None:
    work = released()
    size = 64e9
    ring = ring_seconds(work, work.dense_group, size)
    # Eight adapters of a node carry a ring together: 8 x 50e9 x 0.8, which is below NVLink's 450e9 x 0.8.
    assert ring == pytest.approx(size * 255 / 256 / 320e9, rel=0.02)
    alone = ring_seconds(work, work.expert_shard_group, size)
    assert alone == pytest.approx(size * 3 / 4 / 40e9, rel=0.01)
    # Rows of 8 choices for 4,096 tokens, 56 of 64 to other nodes; once a node, a token leaves for 3.6 of 8 of them.
    inside, across = all_to_all_seconds(work, 2 * 7168)
    assert inside + across == pytest.approx(8 * 4096 * 14336 * 56 / 64 / 35e9, rel=0.01)
    away = 4 * (1 - 0.75**8) * 4096 * 14336 * 7 / 8
    once = replace(work, expert_ranks_per_node=8)
    inside, across = all_to_all_seconds(once, 2 * 7168)
    assert across == pytest.approx(away / 35e9, rel=0.01)
    assert inside == pytest.approx(8 * 4096 * 14336 * 7 / 8 / 360e9, rel=0.01)
    # Kernels that do both at a time hide one behind the other.
    assert sum(all_to_all_seconds(replace(once, fused_all_to_all=True), 2 * 7168)) == pytest.approx(
        away / 45e9, rel=0.01
    )


@pytest.mark.parametrize(
    ("spec", "told"),
    [
        (
            {"kind": "nodes", "gpu": "H1000", "nodes": 2},
            "gpu: unknown hardware; known are H100, ",
        ),
        ({"kind": "nodes", "nodes": 2}, "gpu: is required with kind nodes"),
        ({"kind": "nodes", "gpu": "H100", "price_per_gpu_hour": -1.0}, "price_per_gpu_hour: input should be greater"),
        (
            {"kind": "nodes", "provider": "p", "gpu": "H100", "nodes": 2, "hosts": ["a", "a"]},
            "hosts: each host must be named once",
        ),
        (
            {"kind": "nodes", "provider": "p", "gpu": "H100", "nodes": 2, "hosts": ["a"]},
            "hosts: must name all of the 2 nodes or none",
        ),
        ({"kind": "local", "nodes": 2}, "nodes: must be 1 with kind local"),
        ({"kind": "nodes", "gpu": "H100", "assumed_imbalance": 0.5}, "assumed_imbalance: input should be greater"),
    ],
)
def test_a_wrong_cluster_is_a_sentence(spec: dict[str, object], told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        validate(spec, ClusterSpec, origin="spec.yaml")
    assert f"spec.yaml: 1 problem\n  {told}" in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "cluster", "told"),
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
def test_a_job_that_does_not_go_on_a_cluster_is_refused(overrides: list[str], cluster: ClusterSpec, told: str) -> None:
    config = load(ROOT / "configs" / "671b.yaml", RunConfig, overrides)
    with pytest.raises(ConfigError, match="the job does not fit the cluster") as caught:
        workload_of(config, cluster)
    assert told in str(caught.value)


def test_a_cpu_shares_its_memory_among_its_ranks() -> None:
    one = released(gpu=GPUS["laptop"], gpus_per_node=1, shard=1, expert=1, precision="fp32")
    two = memory_of(replace(one, gpus_per_node=2, shard=2))[0].usable
    assert memory_of(one)[0].usable + PROCESS_BYTES == 2 * (two + PROCESS_BYTES) < 16 * GIB


def test_the_planner_and_the_engine_name_the_same_axes() -> None:
    assert {"replicate", "shard", "context", "expert"} <= set(ParallelConfig.model_fields)
