"""The plan's memory against the engine: a simulated sharded step, and peaks that GPUs have shown."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from unittest import mock

import pytest
import torch

from benchmarks.plan_cases import benchmark_workload
from benchmarks.simulated_step import simulate, slice_of_671b
from cherry.hardware import GIB, GPUS
from cherry.job_config import ParallelConfig, TrainConfig
from cherry.planner.activations import layer_activations
from cherry.planner.memory import fsdp_buffers, memory_of
from cherry.planner.step_time import step_time
from cherry.planner.units import network_of
from cherry.planner.workload import Workload
from model.rope import rotary_tables
from model.transformer import Block

SMALL_STEP = {
    "impl": "cherry",
    "size": "3b",
    "gpu": "NVIDIA H200",
    "precision": "bf16",
    "batch": 1,
    "length": 128,
    "experts": 64,
}
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


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the compiler meets torch's own
@pytest.mark.parametrize("moe", [True, False])
def test_a_compiled_block_keeps_what_the_plan_says(moe: bool) -> None:
    """Saved tensors of a real block of V2-Lite's widths, on a CPU: attention there pads values to the keys' width."""
    work = benchmark_workload({**SMALL_STEP, "compile": True})
    config = work.model
    block = Block(config, moe=moe).to(torch.bfloat16).train()
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    for buffer in block.buffers():
        buffer.zero_()
    tables = rotary_tables(config, torch.arange(work.tokens))
    x_BTD = torch.randn(1, work.tokens, config.hidden_size, dtype=torch.bfloat16, requires_grad=True)
    whole = [*block.parameters(), *block.buffers(), *vars(tables).values()]
    apart = {tensor.untyped_storage().data_ptr() for tensor in whole}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in apart and tensor.shape != (config.n_routed_experts, config.hidden_size):
            kept[storage.data_ptr()] = storage.nbytes()  # but for the router's weight in fp32
        return tensor

    compiled = torch.compile(block, backend="aot_eager_decomp_partition", dynamic=False)
    with mock.patch("model.experts.can_group", lambda *_: True):
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            out = compiled(x_BTD, tables)
        torch._dynamo.reset()
    assert out.hidden_BTD.shape == x_BTD.shape
    # Values and results as wide as keys, the result once more at its own width, but no keys beside the values.
    heads, padding = config.num_attention_heads, config.qk_head_dim - config.v_head_dim
    on_cpu = 2 * heads * (2 * padding + config.v_head_dim - config.qk_nope_head_dim) * work.tokens
    planned = layer_activations(work, moe=moe, imbalance=1.0).saved + on_cpu
    assert sum(kept.values()) == pytest.approx(planned, rel=0.01)
