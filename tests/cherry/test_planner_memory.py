"""The plan's memory against the engine: a simulated sharded step, and peaks that GPUs have shown."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from benchmarks.plan_cases import benchmark_workload
from benchmarks.simulated_step import simulate, slice_of_671b
from cherry.config import ParallelConfig, TrainConfig
from cherry.planner.hardware import GIB, GPUS
from cherry.planner.memory import gathering_of, memory_of
from cherry.planner.step import step_time
from cherry.planner.units import network_of
from cherry.planner.workload import Workload

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "axes"),
    [
        (256, {"expert": 64}),
        (1024, {"expert": 64}),
        (256, {"expert": 32, "replicate": 2}),
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
        **asdict(gathering_of(work)),
    }
    for kind, size in asdict(held).items():
        assert planned[kind] == pytest.approx(size, rel=0.05), kind


@pytest.mark.parametrize("row", json.loads((RESULTS / "scale.json").read_text()), ids=lambda row: row["step_ms"])
def test_measured_steps_are_what_the_plan_says(row: dict) -> None:
    """Kept rows of one H200 over sequence lengths, experts and micro-batches: peak within 5 %, time within 15 %."""
    work = benchmark_workload(row)
    assert memory_of(work)[0].allocated / GIB == pytest.approx(row["peak_gib"], rel=0.05)
    assert 1000 * step_time(work).total == pytest.approx(row["step_ms"], rel=0.15)
