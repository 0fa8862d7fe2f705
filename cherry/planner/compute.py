"""Compute time of one device: a layer, the head and the optimizer's step, forward and backward separately.

A matmul's rate depends on its sizes and precision; memory-bound operations go at the rate of a large copy. The two
passes are separate because communication overlaps with each of them by itself.
"""

from __future__ import annotations

from dataclasses import dataclass

from cherry.planner.matmuls import (
    backward_seconds,
    compute_precision,
    forward_seconds,
    head_matmul,
    layer_matmuls,
    memory_seconds,
    mtp_matmul,
    requantize_seconds,
)
from cherry.planner.units import EXPERTS, network_of
from cherry.planner.workload import Workload

# Passes over memory between matmuls, counted for compiled blocks: norms and residuals touch a token's width so often,
# and rotation, splits and joins a head's widths. Together they give the 8.9 ms of benchmarks/results/step_parts.jsonl
# (one H200, 2026-11-25) within 10 %. Eager blocks run each operation by itself: the eager step of 2026-11-24 took 25 ms
# more than the compiled one (benchmarks/results/train_step.json), 2.8 times the 8.9.
_WIDTH_PASSES_FORWARD, _WIDTH_PASSES_BACKWARD = 14.0, 26.0
_HEAD_PASSES_FORWARD, _HEAD_PASSES_BACKWARD = 2.0, 3.0
_EAGER = 3.8
# Permute and unpermute, rows by index: 3.55 ms for 2.26 ms of bytes, same rows.
_PERMUTE_EFFICIENCY = 0.64
# Loss and gradient from logits: 3.04 ms for 1.61 ms of bytes.
_LOSS_EFFICIENCY = 0.53


@dataclass(frozen=True)
class Times:
    """Seconds of a pass, by kind of operation."""

    matmuls: float = 0.0
    experts: float = 0.0
    attention: float = 0.0
    memory: float = 0.0

    @property
    def total(self) -> float:
        """Seconds of the whole pass."""
        return self.matmuls + self.experts + self.attention + self.memory

    def __add__(self, other: Times) -> Times:
        return Times(
            self.matmuls + other.matmuls,
            self.experts + other.experts,
            self.attention + other.attention,
            self.memory + other.memory,
        )

    def __mul__(self, factor: float) -> Times:
        return Times(self.matmuls * factor, self.experts * factor, self.attention * factor, self.memory * factor)


@dataclass(frozen=True)
class Passes:
    """Forward and backward pass of one layer, or of the head."""

    forward: Times
    backward: Times


def layer_passes(work: Workload, *, moe: bool) -> Passes:
    """Times of one decoder layer over a micro-batch, on the EP rank with most rows.

    With full recompute the backward pass contains another forward pass.
    """
    matmuls = layer_matmuls(work, moe=moe)
    dense = [matmul for matmul in matmuls if not matmul.name.startswith(EXPERTS)]
    grouped = [matmul for matmul in matmuls if matmul.name.startswith(EXPERTS)]
    rows = _permute_seconds(work) if moe else 0.0
    attention = _attention_flops(work) / work.gpu.flops[compute_precision(work)]
    forward_memory, backward_memory = _memory_bytes(work, moe=moe)
    forward = Times(
        matmuls=sum(forward_seconds(work, matmul) for matmul in dense),
        experts=sum(forward_seconds(work, matmul) for matmul in grouped),
        attention=attention / work.efficiency.attention_forward,
        memory=memory_seconds(work, forward_memory) + rows,
    )
    backward = Times(
        matmuls=sum(backward_seconds(work, matmul) for matmul in dense),
        experts=sum(backward_seconds(work, matmul) for matmul in grouped),
        # It recomputes its scores: five products for two.
        attention=2.5 * attention / work.efficiency.attention_backward,
        memory=memory_seconds(work, backward_memory) + rows,
    )
    return Passes(forward, backward + forward if work.recompute == "full" else backward)


def _permute_seconds(work: Workload) -> float:
    """Seconds to permute rows by expert and back: gather, sum by token, and with EP a permute on both ends."""
    routed = work.tokens * work.model.num_experts_per_tok
    moved = 2 * (routed + work.tokens) + (4 * routed * work.imbalance if work.expert > 1 else 0)
    return memory_seconds(work, work.type_bytes * work.model.hidden_size * moved) / _PERMUTE_EFFICIENCY


def _attention_flops(work: Workload) -> float:
    """FLOPs of a layer's attention forward, causal half; the split over context ranks is balanced."""
    model = work.model
    pairs = 0.5 * work.tokens * work.sequence_length
    return 2.0 * pairs * model.num_attention_heads * (model.qk_head_dim + model.v_head_dim)


def _memory_bytes(work: Workload, *, moe: bool) -> tuple[float, float]:
    """Bytes moved by the memory-bound operations of a layer, forward and backward."""
    model, size, tokens = work.model, work.type_bytes, work.tokens
    factor = 1.0 if work.compile else _EAGER
    heads = model.num_attention_heads * (2 * model.qk_head_dim + model.qk_nope_head_dim + model.v_head_dim)
    width = model.hidden_size * tokens * size
    head = heads * tokens * size
    forward = factor * (_WIDTH_PASSES_FORWARD * width + _HEAD_PASSES_FORWARD * head)
    backward = factor * (_WIDTH_PASSES_BACKWARD * width + _HEAD_PASSES_BACKWARD * head)
    inner = model.n_shared_experts * model.moe_intermediate_size if moe else model.intermediate_size
    routed = 0.0
    if moe:
        routed = tokens * model.num_experts_per_tok * work.imbalance * model.moe_intermediate_size
        # Scores, their choice and their balance loss, fp32.
        scores = 4.0 * tokens * model.n_routed_experts
        forward, backward = forward + 10 * scores * factor, backward + 6 * scores * factor
    # Gate and up read, their product written; backward reads three and writes three.
    forward += size * 3 * (inner * tokens + routed)
    backward += size * 6 * (inner * tokens + routed)
    return forward, backward


def head_passes(work: Workload) -> Passes:
    """Times of the head and its loss, for all losses; its gradient is made in the forward pass (cherry/loss.py)."""
    model, tokens = work.model, work.tokens
    losses = 1 + model.num_nextn_predict_layers
    chunks = -(-tokens // min(work.loss_chunk_tokens, tokens))
    elements = model.vocab_size * model.hidden_size
    logits = memory_seconds(work, 2 * work.type_bytes * tokens * model.vocab_size) / _LOSS_EFFICIENCY
    # Every chunk's part of the weight's gradient is read, and the fp32 sum read and written.
    summed = chunks * elements * (work.type_bytes + 8) if chunks > 1 else 0
    scaled = elements * (8 + 4 + work.type_bytes if chunks > 1 else 2 * work.type_bytes)
    head = head_matmul(work)
    products = forward_seconds(work, head) + backward_seconds(work, head)
    memory = losses * (logits + memory_seconds(work, summed))
    return Passes(Times(matmuls=products, memory=memory), Times(memory=losses * memory_seconds(work, scaled)))


def mtp_passes(work: Workload) -> Passes:
    """Times of the MTP module's projection; its block counts as a layer."""
    matmul = mtp_matmul(work)
    return Passes(Times(matmuls=forward_seconds(work, matmul)), Times(matmuls=backward_seconds(work, matmul)))


def optimizer_seconds(work: Workload) -> float:
    """Seconds of the norm's pass, of AdamW with the clip in one pass, and of casting working copies again."""
    network = network_of(work)
    trained = network.total("trained_elements" if work.unsharded else "padded_trained")
    if work.optimizer == "muon":  # its matrices: see cherry/planner/optimizer_cost.py
        trained -= network.total("padded_matrices")
    gradient = work.type_bytes if work.keeps_gradients else 4
    # Parameter and moments read and written, gradient read twice, a working copy written.
    each = 8 + 4 * work.moment_bytes + 2 * gradient + (work.type_bytes if work.keeps_working_copies else 0)
    moved = each * trained
    seconds = memory_seconds(work, moved) + requantize_seconds(work)
    if work.cpu_offload:  # parameters' copies and gradients are transferred, and the CPU's memory is the slower one
        seconds = max(seconds, 4 * trained / work.gpu.host_rate) + moved / work.gpu.host_rate
    return seconds


def fsdp_copy_bytes(work: Workload, elements: int, trained: int) -> tuple[float, float]:
    """Bytes that FSDP2 moves in device memory in a forward and in a backward pass.

    Copies out of the all-gather buffer, and copies of gradients into the reduce-scatter buffer.
    """
    if work.keeps_working_copies and work.ranks > 1:  # the parts of an own gradient are read, their sum is written
        return 0.0, work.type_bytes * trained + 4.0 * trained / work.ranks
    if work.keeps_working_copies or work.unsharded:
        return 0.0, 0.0
    out = 2.0 * work.type_bytes * elements
    return out, (out if work.kept_share < 1 else 0.0) + (work.type_bytes + work.reduce_bytes) * trained
