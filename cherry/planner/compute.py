"""Owns how long a device computes on one layer, on the head and on the optimizer's step.

It knows nothing of other ranks. A matmul's rate depends on its sizes and precision; all that moves memory goes at the
rate of a large copy. Forward and backward are told apart because communication hides behind each of them by itself.
"""

from __future__ import annotations

from dataclasses import dataclass

from cherry.planner.units import attention_linears, network_of, shared_linears
from cherry.planner.workload import Workload

# Passes over memory between matmuls, counted for compiled blocks: norms and residuals touch a token's width so often,
# and rotation, splits and joins a head's widths. Together they give the 8.9 ms of benchmarks/results/step_parts.jsonl
# (one H200, 2026-11-25) within 10 %. Eager blocks run each operation by itself: the eager step of 2026-11-24 took 25 ms
# more than the compiled one (benchmarks/results/train_step.json), 2.8 times the 8.9.
_WIDTH_PASSES_FORWARD, _WIDTH_PASSES_BACKWARD = 14.0, 26.0
_HEAD_PASSES_FORWARD, _HEAD_PASSES_BACKWARD = 2.0, 3.0
_EAGER = 3.8
# Rows to experts and back by index: 3.55 ms for 2.26 ms of bytes, same rows.
_ROWS_REACH = 0.64
# Loss and gradient from logits: 3.04 ms for 1.61 ms of bytes.
_LOSS_REACH = 0.53
# A fp8 matmul's operands: a read in bf16, a write in fp8, and a second layout of both for the weight's gradient
# (tiles of 128 along another dimension; DeepSeek-V3, arXiv 2412.19437, section 3.3.2): bytes an element and matmul.
_CAST_BYTES = 2 + 1 + 1


@dataclass(frozen=True)
class Times:
    """Seconds of a forward and of a backward pass, by kind of work."""

    matmuls: float = 0.0
    experts: float = 0.0
    attention: float = 0.0
    memory: float = 0.0

    @property
    def total(self) -> float:
        """All of it."""
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
    """One layer, or the head."""

    forward: Times
    backward: Times


def matmul_seconds(work: Workload, rows: float, into: int, out: int, *, precision: str | None = None) -> float:
    """One product of [rows, into] with [into, out]; its two gradients take the same three sizes."""
    precision = precision or work.precision
    reach = work.reach
    mean = 3.0 / (1.0 / max(rows, 1.0) + 1.0 / into + 1.0 / out)
    rate = work.gpu.flops[precision] * reach.matmul * mean / (mean + reach.matmul_half[precision])
    seconds = 2.0 * rows * into * out / rate
    if precision == "fp8":
        seconds += memory_seconds(work, _CAST_BYTES * rows * into)
    return seconds


def memory_seconds(work: Workload, moved_bytes: float) -> float:
    """Reading and writing so many bytes."""
    return moved_bytes / (work.gpu.memory_rate * work.reach.memory)


def layer_passes(work: Workload, *, moe: bool) -> Passes:
    """One decoder layer over a micro-batch, on the busiest rank; with full recompute the forward pass runs twice."""
    linears = _linear_seconds(work, moe=moe)
    experts, rows = _expert_seconds(work) if moe else (0.0, 0.0)
    attention = _attention_flops(work) / work.gpu.flops[_attention_precision(work)]
    forward_memory, backward_memory = _memory_bytes(work, moe=moe)
    forward = Times(
        linears, experts, attention / work.reach.attention_forward, memory_seconds(work, forward_memory) + rows
    )
    # Two products for each one of the forward pass; attention makes its scores again: five for two.
    backward = Times(
        2 * linears,
        2 * experts,
        2.5 * attention / work.reach.attention_backward,
        memory_seconds(work, backward_memory) + rows,
    )
    return Passes(forward, backward + forward if work.recompute == "full" else backward)


def _attention_precision(work: Workload) -> str:
    """DeepSeek-V3 keeps attention in high precision (section 3.3.1)."""
    return "bf16" if work.precision == "fp8" else work.precision


def _linear_seconds(work: Workload, *, moe: bool) -> float:
    """Dense matmuls of a forward pass."""
    model, tokens = work.model, work.tokens
    linears = dict(attention_linears(model))
    seconds = 0.0
    if work.context > 1:  # every rank makes keys and values of the whole sequence
        out, into = linears.pop("kv_b_proj")
        seconds += matmul_seconds(work, tokens * work.context, into, out)
    shapes = [*linears.values()]
    if moe:
        shapes += shared_linears(model).values()
        # The router computes in fp32, on CUDA cores (model/moe.py; torch leaves tf32 off).
        seconds += matmul_seconds(work, tokens, model.hidden_size, model.n_routed_experts, precision="fp32")
    else:
        shapes += [(2 * model.intermediate_size, model.hidden_size), (model.hidden_size, model.intermediate_size)]
    return seconds + sum(matmul_seconds(work, tokens, into, out) for out, into in shapes)


def _expert_seconds(work: Workload) -> tuple[float, float]:
    """Grouped matmuls of a forward pass, and the way of rows to experts and back."""
    model = work.model
    routed = work.tokens * model.num_experts_per_tok
    own = model.n_routed_experts / work.expert
    rows = routed * work.imbalance / own
    inner, width = model.moe_intermediate_size, model.hidden_size
    matmuls = own * (matmul_seconds(work, rows, width, 2 * inner) + matmul_seconds(work, rows, inner, width))
    # Rows gathered, and summed by token; where they travel, permuted on arrival and before they leave.
    moved = 2 * (routed + work.tokens) + (4 * routed * work.imbalance if work.expert > 1 else 0)
    return matmuls, memory_seconds(work, work.type_bytes * width * moved) / _ROWS_REACH


def _attention_flops(work: Workload) -> float:
    """Forward, the causal half; a token of a context rank sees as much of its sequence as any other."""
    model = work.model
    pairs = 0.5 * work.tokens * work.sequence_length
    return 2.0 * pairs * model.num_attention_heads * (model.qk_head_dim + model.v_head_dim)


def _memory_bytes(work: Workload, *, moe: bool) -> tuple[float, float]:
    """Bytes between the matmuls of a layer, forward and backward."""
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
    """The head and its loss, whose gradient is made in the forward pass (cherry/loss.py), for all losses."""
    model, tokens = work.model, work.tokens
    losses = 1 + model.num_nextn_predict_layers
    precision = _attention_precision(work)
    chunk = min(work.loss_chunk_tokens, tokens)
    chunks = -(-tokens // chunk)
    product = matmul_seconds(work, chunk, model.hidden_size, model.vocab_size, precision=precision)
    elements = model.vocab_size * model.hidden_size
    logits = memory_seconds(work, 2 * work.type_bytes * tokens * model.vocab_size) / _LOSS_REACH
    # Every chunk's part of the weight's gradient is read, and the fp32 sum read and written.
    summed = chunks * elements * (work.type_bytes + 8) if chunks > 1 else 0
    scaled = elements * (8 + 4 + work.type_bytes if chunks > 1 else 2 * work.type_bytes)
    forward = Times(matmuls=3 * chunks * product, memory=logits + memory_seconds(work, summed))
    return Passes(forward * losses, Times(memory=memory_seconds(work, scaled)) * losses)


def mtp_passes(work: Workload) -> Passes:
    """The MTP module's projection of embedding and hidden state; its block counts as a layer."""
    width = work.model.hidden_size
    seconds = work.model.num_nextn_predict_layers * matmul_seconds(work, work.tokens, 2 * width, width)
    return Passes(Times(matmuls=seconds), Times(matmuls=2 * seconds))


def optimizer_seconds(work: Workload) -> float:
    """AdamW with the clip in one pass, and the norm's pass before it."""
    trained = network_of(work).total("trained_elements" if work.unsharded else "padded_trained")
    gradient = work.type_bytes if work.alone and work.accumulation == 1 else 4
    # Parameter and moments read and written, gradient read twice, a working copy written.
    each = 8 + 4 * work.moment_bytes + 2 * gradient + (work.type_bytes if work.alone else 0)
    seconds = memory_seconds(work, each * trained)
    if work.cpu_offload:  # parameters' copies and gradients travel, and the CPU's memory is the slower one
        seconds = max(seconds, 4 * trained / work.gpu.host_rate) + each * trained / work.gpu.host_rate
    return seconds


def gathering_bytes(work: Workload, elements: int, trained: int) -> tuple[float, float]:
    """Memory traffic that FSDP2 adds to a forward and a backward pass.

    Copies out of the gathered buffer, and gradients laid out anew for their sum.
    """
    if work.alone or work.unsharded:
        return 0.0, 0.0
    out = 2.0 * work.type_bytes * elements
    return out, (out if work.kept_share < 1 else 0.0) + (work.type_bytes + work.reduce_bytes) * trained
