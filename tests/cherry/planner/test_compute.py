"""Compute time: attention's FLOPs, recompute, the head's passes, and bytes moved by the optimizer and by FSDP2."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cherry.planner.compute import fsdp_copy_bytes, head_passes, layer_passes, mtp_passes, optimizer_seconds
from cherry.planner.units import network_of
from tests.cherry.planner.workloads import released


def test_attention_takes_the_flops_that_the_model_s_mfu_counts() -> None:
    """Both conventions of FLOPs per token differ by the causal half; training makes three passes of the forward's."""
    work = released()
    model, length = work.model, work.sequence_length
    half = model.flops_per_token(length, causal=False) - model.flops_per_token(length, causal=True)
    passes = layer_passes(replace(work, recompute="none"), moe=True)
    rate = work.gpu.flops["bf16"]
    flops = work.tokens * half / model.num_hidden_layers / 3
    assert passes.forward.attention * rate * work.efficiency.attention_forward == pytest.approx(flops)
    # Its backward pass recomputes the scores: five products for the forward's two.
    assert passes.backward.attention * rate * work.efficiency.attention_backward == pytest.approx(2.5 * flops)


@pytest.mark.parametrize("moe", [False, True])
def test_full_recompute_makes_the_forward_pass_once_more(moe: bool) -> None:
    full = layer_passes(released(recompute="full"), moe=moe)
    none = layer_passes(released(recompute="none"), moe=moe)
    assert full.forward == none.forward
    assert full.backward == none.backward + none.forward


def test_only_a_moe_layer_has_experts_and_the_busiest_rank_s_rows_set_their_time() -> None:
    even, skewed = released(), released(assumed_imbalance=1.5)
    assert layer_passes(even, moe=False).forward.experts == 0 < layer_passes(even, moe=True).forward.experts
    assert layer_passes(skewed, moe=True).forward.experts > layer_passes(even, moe=True).forward.experts
    assert layer_passes(skewed, moe=False) == layer_passes(even, moe=False)


def test_eager_blocks_take_more_memory_passes_and_the_same_matmuls() -> None:
    eager, compiled = (layer_passes(released(compile=compiled), moe=True).forward for compiled in (False, True))
    assert eager.memory > compiled.memory
    assert (eager.matmuls, eager.experts, eager.attention) == (compiled.matmuls, compiled.experts, compiled.attention)


def test_the_head_s_gradient_is_made_in_the_forward_pass_and_each_loss_has_its_head() -> None:
    work = released()
    head = head_passes(work)
    assert head.forward.matmuls > 0 == head.backward.matmuls
    assert mtp_passes(work).forward.total == mtp_passes(work).backward.total == 0
    with_mtp = replace(work, model=work.model.model_copy(update={"num_nextn_predict_layers": 1}))
    assert head_passes(with_mtp).forward.matmuls == pytest.approx(2 * head.forward.matmuls)
    assert mtp_passes(with_mtp).forward.matmuls > 0


@pytest.mark.parametrize(
    ("changes", "element_bytes"),
    [
        # Parameter and two moments read and written, gradient read twice, and the working copy written.
        ({}, 8 + 4 * 4 + 2 * 2 + 2),
        ({"accumulation": 2}, 8 + 4 * 4 + 2 * 4 + 2),  # gradients summed in fp32
        ({"moment_bytes": 2}, 8 + 4 * 2 + 2 * 2 + 2),
        ({"precision": "fp32"}, 8 + 4 * 4 + 2 * 4),  # no working copy
    ],
)
def test_the_optimizer_moves_so_many_bytes_a_parameter(changes: dict[str, object], element_bytes: int) -> None:
    work = released(shard=1, expert=1, gpus_per_node=1, **changes)
    rate = work.gpu.memory_rate * work.efficiency.memory
    moved = optimizer_seconds(work) * rate
    assert moved == pytest.approx(element_bytes * network_of(work).total("trained_elements"), rel=1e-3)


def test_fsdp_copies_gathered_parameters_in_both_passes_and_gradients_in_the_backward_pass() -> None:
    work = released()
    assert fsdp_copy_bytes(work, 1000, 100) == (2 * 2 * 1000, 2 * 2 * 1000 + (2 + 4) * 100)
    until_backward = replace(work, kept_share=1.0, precision="fp32")
    assert fsdp_copy_bytes(until_backward, 1000, 100) == (2 * 4 * 1000, (4 + 4) * 100)
    # From step to step: nothing is copied, the ranks' parts of an own gradient are summed.
    kept = replace(work, kept_share=1.0)
    assert kept.keeps_working_copies and not kept.keeps_gradients
    assert fsdp_copy_bytes(kept, 1000, 100) == (0, 2 * 100 + 4 * 100 / work.ranks)
    alone = released(shard=1, expert=1, gpus_per_node=1)
    assert alone.keeps_working_copies
    assert fsdp_copy_bytes(alone, 1000, 100) == (0, 0)
