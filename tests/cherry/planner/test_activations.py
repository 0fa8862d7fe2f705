"""Activation memory against published arithmetic and the tensors that a real block saves for its backward pass."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

from benchmarks.plan_cases import benchmark_workload
from cherry.planner.activations import boundary_bytes, layer_activations
from model.rope import rotary_tables
from model.transformer import Block
from tests.cherry.planner.workloads import released


def test_activations_of_the_671b_release_are_those_of_the_published_arithmetic() -> None:
    """About 638 KB a token and layer with each routed row's activation and result, which this engine does not keep."""
    work = released()
    routed = 2 * 8 * (2048 + 7168)
    saved = layer_activations(work, moe=True, imbalance=1.0).saved
    assert saved / 4096 + routed == pytest.approx(638e3, rel=0.01)
    assert 61 * boundary_bytes(work) / 1e9 == pytest.approx(3.6, abs=0.05)


SMALL_STEP = {
    "impl": "cherry",
    "size": "3b",
    "gpu": "NVIDIA H200",
    "precision": "bf16",
    "batch": 1,
    "length": 128,
    "experts": 64,
}


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
