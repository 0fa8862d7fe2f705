"""Owns which tensors of a forward pass wait for the backward pass, in bytes of one token.

It knows nothing of parameters or ranks. The lists are what `model/` saves on a GPU: autograd's saved tensors when
blocks run eagerly; compiled blocks make silu's result again instead of keeping it.
"""

from __future__ import annotations

from dataclasses import dataclass

from cherry.planner.matmuls import FP8_BLOCK
from cherry.planner.workload import Workload

# Router: scores twice (the sigmoid's result and the balance loss' quotient), fp32; each choice has an int64 expert, its
# fp32 weight before and after normalising, three int64 places of its row, and the row's fp32 weight with its index.
_BYTES_PER_SCORE = 8
_BYTES_PER_CHOICE = 8 + 3 * 4 + 3 * 8 + 4 + 8
_NORM_BYTES = 4
"""The reciprocal root mean square, fp32."""
_SCALE_BYTES = 4
"""fp32, of 128 fp8 numbers."""


@dataclass(frozen=True)
class Activations:
    """Of one layer, bytes a rank holds."""

    saved: int
    """Between its forward and its backward pass, when nothing is recomputed."""
    transient: int
    """Gradients and results that the backward pass of its largest part makes besides."""
    dispatch: int
    """Rows on their way between ranks."""


def boundary_bytes(work: Workload) -> int:
    """A block's input: all that stays of it with full recompute."""
    return work.type_bytes * work.model.hidden_size * work.tokens


def root_bytes(work: Workload) -> int:
    """What stays outside of blocks: the last norm's input and result, and the MTP module's inputs before its block."""
    mtp = 7 * work.model.num_nextn_predict_layers  # two norms in and out, their concatenation, the projection
    return (2 + mtp) * boundary_bytes(work)


def layer_activations(work: Workload, *, moe: bool, imbalance: float) -> Activations:
    """What one layer keeps and needs.

    Args:
        imbalance: rows of this rank's experts over the mean.
    """
    if not moe:
        saved = _attention(work) + _dense(work)
        operands = 4 * _operand(work) if work.precision == "fp8" else 0  # of gate and up's gradients, both ways
        transient = (4 * work.type_bytes + operands) * work.model.intermediate_size * work.tokens
        return Activations(saved * work.tokens, int(transient), 0)
    model, size = work.model, work.type_bytes
    rows = model.num_experts_per_tok * imbalance * work.tokens
    # Rows after the exchange, and gate and up of each; the activation between the two matmuls is made again.
    padded = rows + (FP8_BLOCK * model.n_routed_experts / work.expert if work.precision == "fp8" else 0)
    kept_rows = padded * (_operand(work) * model.hidden_size + size * 2 * model.moe_intermediate_size)
    if work.precision == "fp32":  # one expert after the other: silu's result, its product, and that product weighted
        kept_rows += size * rows * 3 * model.moe_intermediate_size
    saved_bytes = (_attention(work) + _mixture(work)) * work.tokens + kept_rows
    # Of the rows: the gradients of result and input, of gate, up and their product, and that product again.
    transient = size * rows * (2 * model.hidden_size + 4 * model.moe_intermediate_size)
    if work.precision == "fp8":
        transient = _fp8_transient(work, padded)
    travelling = rows if work.expert > 1 else 0.0
    if work.once_per_node:  # tokens that came to this node, before they are copied to its experts
        travelling += work.nodes_of_a_token * imbalance * work.tokens
    dispatch = size * travelling * model.hidden_size
    return Activations(int(saved_bytes), int(transient), int(dispatch))


def _operand(work: Workload) -> float:
    """Bytes of an element that a matmul keeps for its weight's gradient: in fp8 turned round, with its scale, and a
    copy of its own (DeepSeek-V3, arXiv 2412.19437, section 3.3.3, keeps them so)."""
    return 1 + _SCALE_BYTES / FP8_BLOCK if work.precision == "fp8" else work.type_bytes


def _fp8_transient(work: Workload, rows: float) -> float:
    """What the experts' backward pass makes: gradients of result and input, of the activation, of gate and up; of the
    result's, the activation and gate and up's its operands, rows as they are and turned round; one weight's operand."""
    model, size, operand = work.model, work.type_bytes, _operand(work)
    inner, width = model.moe_intermediate_size, model.hidden_size
    each = 2 * size * width + size * inner + operand * (2 * width + inner + 2 * 2 * inner)
    return rows * each + model.n_routed_experts / work.expert * 2 * inner * width


def _attention(work: Workload) -> int:
    """Bytes a token of norm, projections and attention."""
    model, size, heads = work.model, work.type_bytes, work.model.num_attention_heads
    width, latent = model.hidden_size, model.kv_lora_rank + model.qk_rope_head_dim
    query = model.q_lora_rank or 0
    keys = heads * (model.qk_head_dim + model.qk_nope_head_dim + model.v_head_dim)
    kept = width + query + heads * model.qk_head_dim  # input, low-rank query, rotated queries
    # With context ranks, keys and values of the whole sequence.
    kept += (latent + keys) * work.context
    kept += heads * model.v_head_dim + width  # attention's result; the sum with the input
    taken = width + query + model.kv_lora_rank * work.context  # results of the norms: what matmuls take is kept
    if work.precision == "fp8":  # by each of them: two take the input, and the output projection attention's result
        taken += width + heads * model.v_head_dim
    return int(size * kept + _operand(work) * taken) + 4 * heads + 3 * _NORM_BYTES  # and the softmax's fp32 normaliser


def _dense(work: Workload) -> int:
    """Bytes a token of a dense feed-forward."""
    inner = work.model.intermediate_size
    kept = 2 * inner + (0 if work.compile else inner)  # gate and up; silu's result
    taken = inner + work.model.hidden_size  # their product; the norm's result
    return int(work.type_bytes * kept + _operand(work) * taken)


def _mixture(work: Workload) -> int:
    """Bytes a token of router and shared experts, without the routed rows."""
    model, shared = work.model, work.model.n_shared_experts * work.model.moe_intermediate_size
    kept = 2 * shared + (0 if work.compile else shared)  # gate and up; silu's result
    taken = shared + model.hidden_size  # their product; the norm's result
    router = _BYTES_PER_SCORE * model.n_routed_experts + _BYTES_PER_CHOICE * model.num_experts_per_tok
    in_fp32 = 4 * model.hidden_size if work.type_bytes < 4 else 0  # the router's input
    return int(work.type_bytes * kept + _operand(work) * taken) + router + in_fp32
