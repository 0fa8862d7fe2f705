"""The plan's memory against the engine: a simulated sharded step, and peaks that GPUs have shown."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from benchmarks.plan_cases import benchmark_workload
from benchmarks.simulated_step import simulate, slice_of_671b
from cherry.hardware import GIB, GPUS, PROCESS_BYTES
from cherry.job_config import ParallelConfig
from cherry.planner.activations import layer_activations
from cherry.planner.memory import fsdp_buffers, memory_of
from cherry.planner.step_time import step_time
from cherry.planner.units import network_of
from cherry.planner.workload import Workload
from cherry.train_config import TrainConfig
from tests.cherry.planner.workloads import released, released_fp8

RESULTS = Path(__file__).resolve().parents[3] / "benchmarks" / "results"
SCALE = json.loads((RESULTS / "scale.json").read_text())
CONFIGURATIONS = [json.loads(line) for line in (RESULTS / "plan_gpu.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "axes"),
    [
        (256, {"expert": 64}),
        (1024, {"expert": 64}),
        (256, {"expert": 32}),
        (512, {"expert": 32, "replicate": 2}),
        (1024, {"expert": 32, "replicate": 4}),
        (256, {}),  # no expert axis: a layer is gathered whole
    ],
)
def test_a_simulated_step_holds_what_the_plan_says(ranks: int, axes: dict[str, int]) -> None:
    config, parallel = slice_of_671b(), ParallelConfig(**axes)
    train = TrainConfig(precision="bf16", activation_checkpointing="full")
    held = simulate(config, ranks, parallel, train, sequences=1, length=4096)
    work = Workload(
        model=config,
        gpu=GPUS["H100"],
        gpus_per_node=8,
        replicate=parallel.replicate,
        shard=parallel.shard_ranks(ranks),
        context=1,
        expert=parallel.expert,
        micro_sequences=1,
        accumulation=1,
        sequence_length=4096,
        precision="bf16",
        recompute="full",
    )
    network = network_of(work)
    planned = {
        "parameters": 4 * network.total("padded"),
        "gradients": 4 * network.total("padded_trained"),
        "states": 8 * network.total("padded_trained"),
        **asdict(fsdp_buffers(work)),
        "peak": memory_of(work)[0].allocated,
    }
    for kind, size in asdict(held).items():
        assert planned[kind] == pytest.approx(size, rel=0.05), kind


@pytest.mark.parametrize("row", [*SCALE, *CONFIGURATIONS], ids=lambda row: row.get("case", row["step_ms"]))
def test_measured_steps_are_what_the_plan_says(row: dict) -> None:
    """Kept rows of one H200 over sequence lengths, experts, micro-batches, recompute and precision: peak within 5 %,
    time within 15 %."""
    work = benchmark_workload(row)
    assert memory_of(work)[0].allocated / GIB == pytest.approx(row["peak_gib"], rel=0.05)
    assert 1000 * step_time(work).total == pytest.approx(row["step_ms"], rel=0.15)


@pytest.mark.parametrize("row", CONFIGURATIONS, ids=lambda row: row["case"])
def test_the_allowance_for_fragmentation_is_what_the_allocator_took(row: dict) -> None:
    """But for fp32, which had three quarters of the GPU free."""
    ranks = memory_of(benchmark_workload(row))[0]
    took = row["reserved_gib"] - row["peak_gib"]
    assert (took <= ranks.components["fragmentation"] / GIB) == (row["precision"] != "fp32")


@pytest.mark.parametrize(("ranks", "gigabytes"), [(256, 41.9), (512, 21.0), (1024, 10.5)])
def test_states_of_the_671b_release_are_what_their_bytes_give(ranks: int, gigabytes: float) -> None:
    """16 bytes a parameter; 8.05 TB of them in a checkpoint."""
    components = memory_of(released(shard=ranks // 64))[0].stages["optimizer"]
    held = sum(components[name] for name in ("parameters", "gradients", "optimizer states"))
    assert held / 1e9 == pytest.approx(gigabytes, rel=0.005)
    thin = memory_of(released(shard=ranks // 64, moment_bytes=2))[0].stages["optimizer"]
    assert 2 * thin["optimizer states"] == components["optimizer states"]


def test_a_cpu_shares_its_memory_among_its_ranks() -> None:
    alone = released(gpu=GPUS["laptop"], gpus_per_node=1, shard=1, expert=1, precision="fp32")
    shared = memory_of(replace(alone, gpus_per_node=2, shard=2))[0].usable
    assert memory_of(alone)[0].usable + PROCESS_BYTES == 2 * (shared + PROCESS_BYTES) < 16 * GIB


def test_memory_is_bf16s_but_for_what_matmuls_keep() -> None:
    narrow, wide = memory_of(released_fp8())[0], memory_of(released_fp8(precision="bf16"))[0]
    for stage, components in narrow.stages.items():
        for name in ("parameters", "gradients", "optimizer states", "gathered layers", "reduction buffers", "dispatch"):
            assert components[name] == wide.stages[stage][name], (stage, name)
    assert narrow.total == pytest.approx(wide.total, rel=0.02)
    for moe in (True, False):
        kept = [
            layer_activations(released_fp8(precision=precision, recompute="none"), moe=moe, imbalance=1.0).saved
            for precision in ("fp8", "bf16")
        ]
        assert kept[0] < kept[1]
