"""Activation memory: bytes of the tensors that a layer saves for its backward pass, and of those made there.

The lists are what `model/` saves on a GPU: autograd's saved tensors when blocks run eagerly; compiled blocks recompute
silu's result instead of saving it.
"""

from __future__ import annotations

from dataclasses import dataclass

from cherry.planner.matmuls import FP8_BLOCK
from cherry.planner.workload import Workload

# Router: scores twice (the sigmoid's result and the balance loss' quotient), fp32; each top-k slot has an int64 expert,
# its fp32 weight before and after normalising, three int64 positions of its row, and the row's fp32 weight with its
# index.
_BYTES_PER_SCORE = 8
_BYTES_PER_SLOT = 8 + 3 * 4 + 3 * 8 + 4 + 8
_NORM_BYTES = 4
"""Bytes of a token's reciprocal root mean square, fp32."""
_SCALE_BYTES = 4
"""Bytes of the fp32 scale of a block of 128 fp8 numbers."""


@dataclass(frozen=True)
class Activations:
    """Activation memory of one layer on one rank, bytes."""

    saved: int
    """Saved from the forward to the backward pass, without recompute."""
    transient: int
    """Gradients and intermediate results that the backward pass of its largest part makes besides."""
    dispatch: int
    """Buffers of the dispatch and combine."""


def boundary_bytes(work: Workload) -> int:
    """Bytes of a block's input: all that is saved of it with full recompute."""
    return work.type_bytes * work.model.hidden_size * work.tokens


def root_bytes(work: Workload) -> int:
    """Bytes saved outside of blocks: the last norm's input and result, and the MTP module's inputs before its block."""
    mtp = 7 * work.model.num_nextn_predict_layers  # two norms in and out, their concatenation, the projection
    return (2 + mtp) * boundary_bytes(work)


def layer_activations(work: Workload, *, moe: bool, imbalance: float) -> Activations:
    """Activation memory of one decoder layer.

    Args:
        imbalance: EP load imbalance: routed rows of this rank's experts over the mean.
    """
    if not moe:
        saved = _attention(work) + _dense(work)
        operands = (
            4 * _operand(work) if work.precision == "fp8" else 0
        )  # of the gradients of gate and up, plain and transposed
        transient = (4 * work.type_bytes + operands) * work.model.intermediate_size * work.tokens
        return Activations(saved * work.tokens, int(transient), 0)
    model, size = work.model, work.type_bytes
    rows = model.num_experts_per_tok * imbalance * work.tokens
    # Rows after the dispatch, and gate and up of each; the activation between the two matmuls is recomputed.
    padded = rows + (FP8_BLOCK * model.n_routed_experts / work.expert if work.precision == "fp8" else 0)
    kept_rows = padded * (_operand(work) * model.hidden_size + size * 2 * model.moe_intermediate_size)
    if work.precision == "fp32":  # one expert after the other: silu's result, its product, and that product weighted
        kept_rows += size * rows * 3 * model.moe_intermediate_size
    saved_bytes = (_attention(work) + _moe(work)) * work.tokens + kept_rows
    # Of each row: the gradients of result and input, of gate, up and their product, and that product recomputed.
    transient = size * rows * (2 * model.hidden_size + 4 * model.moe_intermediate_size)
    if work.precision == "fp8":
        transient = _fp8_transient(work, padded)
    dispatched = rows if work.expert > 1 else 0.0
    if work.gathers_tokens:  # those of all ranks, and the sums for them
        dispatched = 2 * work.expert * work.tokens
    if work.once_per_node:  # tokens that came to this node, before they are copied to its experts
        dispatched += work.nodes_of_a_token * imbalance * work.tokens
    dispatch = size * dispatched * model.hidden_size
    return Activations(int(saved_bytes), int(transient), int(dispatch))


def _operand(work: Workload) -> float:
    """Bytes per element of the operand that a matmul saves for its weight's gradient.

    In fp8 it is a transposed copy of its own, with its scales (as in DeepSeek-V3, arXiv 2412.19437, section 3.3.3).
    """
    return 1 + _SCALE_BYTES / FP8_BLOCK if work.precision == "fp8" else work.type_bytes


def _fp8_transient(work: Workload, rows: float) -> float:
    """Bytes that the experts' backward pass makes in fp8.

    Gradients of result and input, of the activation, of gate and up; fp8 operands, plain and transposed, of the
    result's gradient, the activation, and the gradients of gate and up; one weight's operand.
    """
    model, size, operand = work.model, work.type_bytes, _operand(work)
    inner, width = model.moe_intermediate_size, model.hidden_size
    each = 2 * size * width + size * inner + operand * (2 * width + inner + 2 * 2 * inner)
    return rows * each + model.n_routed_experts / work.expert * 2 * inner * width


def _attention(work: Workload) -> int:
    """Bytes per token that norm, projections and attention save."""
    model, size, heads = work.model, work.type_bytes, work.model.num_attention_heads
    width, latent = model.hidden_size, model.kv_lora_rank + model.qk_rope_head_dim
    query = model.q_lora_rank or 0
    keys = heads * (model.qk_head_dim + model.qk_nope_head_dim + model.v_head_dim)
    kept = width + query + heads * model.qk_head_dim  # input, low-rank query, rotated queries
    # With context ranks, keys and values of the whole sequence.
    kept += (latent + keys) * work.context
    kept += heads * model.v_head_dim + width  # attention's result; the sum with the input
    taken = width + query + model.kv_lora_rank * work.context  # results of the norms, saved by the matmuls
    if work.precision == "fp8":  # by each of them: two take the input, and the output projection attention's result
        taken += width + heads * model.v_head_dim
    return int(size * kept + _operand(work) * taken) + 4 * heads + 3 * _NORM_BYTES  # and the softmax's fp32 normaliser


def _dense(work: Workload) -> int:
    """Bytes per token that a dense feed-forward saves."""
    inner = work.model.intermediate_size
    kept = 2 * inner + (0 if work.compile else inner)  # gate and up; silu's result
    taken = inner + work.model.hidden_size  # their product; the norm's result
    return int(work.type_bytes * kept + _operand(work) * taken)


def _moe(work: Workload) -> int:
    """Bytes per token that router and shared experts save, without the routed rows."""
    model, shared = work.model, work.model.n_shared_experts * work.model.moe_intermediate_size
    kept = 2 * shared + (0 if work.compile else shared)  # gate and up; silu's result
    taken = shared + model.hidden_size  # their product; the norm's result
    router = _BYTES_PER_SCORE * model.n_routed_experts + _BYTES_PER_SLOT * model.num_experts_per_tok
    in_fp32 = 4 * model.hidden_size if work.type_bytes < 4 else 0  # the router's input
    return int(work.type_bytes * kept + _operand(work) * taken) + router + in_fp32
