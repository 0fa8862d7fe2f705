"""Matmuls of a step, by sizes and precision, and the time of each; other operations: cherry/planner/compute.py.

In fp8 the projections of blocks and their experts multiply in e4m3, forward, for input gradients and for weight
gradients; the head, the MTP module's projection and attention itself stay in bf16 (DeepSeek-V3, arXiv 2412.19437,
section 3.3.1).
"""

from __future__ import annotations

from dataclasses import dataclass

from cherry.planner.workload import Workload

FP8_BLOCK = 128
"""Numbers that share a scale (section 3.3.2); narrower matmuls stay in bf16."""
# Bytes per element moved to quantize fp8 operands. Activations and gradients: a read in bf16, a write in fp8, and
# another, transposed write, whose scales run along the other dimension, for the weight's gradient. Weights: a read and
# a write in each pass, or once a step plain and transposed where working copies stay (model/fp8/linear.py).
_ROWS_CAST_BYTES = 2 + 1 + 1
_WEIGHT_CAST_BYTES = 2 + 1
_CACHED_CAST_BYTES = 2 + 1 + 1
CACHED_FP8_BYTES = 1 + 1
"""Bytes per element of a weight's cached fp8 operands, plain and transposed, without their scales."""


@dataclass(frozen=True)
class Matmul:
    """A matmul of [rows, into] with [into, out], and how often a forward pass makes it."""

    name: str
    rows: float
    into: int
    out: int
    precision: str
    count: float = 1.0

    @property
    def flops(self) -> float:
        """FLOPs of one forward pass over all `count` of them."""
        return 2.0 * self.rows * self.into * self.out * self.count


@dataclass(frozen=True)
class MatmulTime:
    """Seconds and FLOPs of one matmul in a whole step, over all its passes."""

    matmul: Matmul
    seconds: float
    flops: float

    def __add__(self, other: MatmulTime) -> MatmulTime:
        return MatmulTime(self.matmul, self.seconds + other.seconds, self.flops + other.flops)


def compute_precision(work: Workload) -> str:
    """Precision of the operations that are not in fp8."""
    return "bf16" if work.precision == "fp8" else work.precision


def layer_matmuls(work: Workload, *, moe: bool) -> list[Matmul]:
    """The matmuls of one decoder layer's forward pass."""
    model, tokens = work.model, work.tokens
    # Every context parallel rank computes keys and values of the whole sequence.
    rows = {"kv_b_proj": tokens * work.context}
    shapes = model.attention_linears()
    if moe:
        shapes |= model.shared_expert_linears()
    else:
        inner, width = model.intermediate_size, model.hidden_size
        shapes |= {"dense_gate_up": (2 * inner, width), "dense_down": (width, inner)}
    found = [
        Matmul(name, rows.get(name, tokens), into, out, _block_precision(work, into, out))
        for name, (out, into) in shapes.items()
    ]
    return found + _moe_matmuls(work) if moe else found


def _moe_matmuls(work: Workload) -> list[Matmul]:
    """The matmuls of the router and of the routed experts on the EP rank with most rows.

    The router multiplies in fp32 or TensorFloat32 (cherry/training_model.py); it is so narrow that it takes as long as
    in bf16.
    """
    model = work.model
    inner, width, own = model.moe_intermediate_size, model.hidden_size, model.n_routed_experts / work.expert
    rows = work.tokens * model.num_experts_per_tok * work.imbalance / own
    in_blocks = width % FP8_BLOCK == 0 and inner % FP8_BLOCK == 0
    precision = work.precision if in_blocks else compute_precision(work)
    return [
        Matmul("router", work.tokens, width, model.n_routed_experts, compute_precision(work)),
        Matmul("experts_gate_up", rows, width, 2 * inner, precision, own),
        Matmul("experts_down", rows, inner, width, precision, own),
    ]


def _block_precision(work: Workload, into: int, out: int) -> str:
    return work.precision if min(into, out) >= FP8_BLOCK else compute_precision(work)


def head_matmul(work: Workload) -> Matmul:
    """The head's matmul, a chunk of tokens at a time, for every loss."""
    model, chunk = work.model, min(work.loss_chunk_tokens, work.tokens)
    count = -(-work.tokens // chunk) * (1 + model.num_nextn_predict_layers)
    return Matmul("lm_head", chunk, model.hidden_size, model.vocab_size, compute_precision(work), count)


def mtp_matmul(work: Workload) -> Matmul:
    """The MTP module's projection of embedding and hidden state; its block counts as a layer."""
    width = work.model.hidden_size
    count = work.model.num_nextn_predict_layers
    return Matmul("mtp_projection", work.tokens, 2 * width, width, compute_precision(work), count)


def forward_seconds(work: Workload, matmul: Matmul) -> float:
    """Seconds of a matmul in a forward pass, quantization of its operands included."""
    return _product_seconds(work, matmul) + _cast_seconds(work, matmul, matmul.into)


def backward_seconds(work: Workload, matmul: Matmul) -> float:
    """Seconds of a matmul in a backward pass: its input's and its weight's gradient, products of the same sizes."""
    return 2 * _product_seconds(work, matmul) + _cast_seconds(work, matmul, matmul.out)


def time_of(work: Workload, matmul: Matmul, *, times: int, forwards: int = 1) -> MatmulTime:
    """Time of a matmul in `times` backward passes, each with `forwards` forward passes before it."""
    seconds = forwards * forward_seconds(work, matmul) + backward_seconds(work, matmul)
    return MatmulTime(matmul, times * seconds, times * (forwards + 2) * matmul.flops)


def _product_seconds(work: Workload, matmul: Matmul) -> float:
    achieved, precision = work.efficiency, matmul.precision
    mean = 3.0 / (1.0 / max(matmul.rows, 1.0) + 1.0 / matmul.into + 1.0 / matmul.out)
    rate = work.gpu.flops[precision] * achieved.matmul[precision] * mean / (mean + achieved.matmul_half[precision])
    return matmul.flops / rate


def _cast_seconds(work: Workload, matmul: Matmul, width: int) -> float:
    """Seconds to quantize the operands of a pass whose rows are `width` wide."""
    if matmul.precision != "fp8":
        return 0.0
    weight = 0 if work.keeps_working_copies else _WEIGHT_CAST_BYTES
    moved = _ROWS_CAST_BYTES * matmul.rows * width + weight * matmul.into * matmul.out
    return memory_seconds(work, matmul.count * moved)


def cached_fp8_elements(work: Workload) -> float:
    """Elements of the weights whose fp8 operands are cached over a step: all of a rank with working copies."""
    if not work.keeps_working_copies:
        return 0.0
    model = work.model
    dense = min(model.first_k_dense_replace, model.num_hidden_layers)
    mixture = model.num_hidden_layers - dense + model.num_nextn_predict_layers
    layers = (dense, layer_matmuls(work, moe=False)), (mixture, layer_matmuls(work, moe=True))
    return sum(
        count * matmul.count * matmul.into * matmul.out
        for count, found in layers
        for matmul in found
        if matmul.precision == "fp8"
    )


def requantize_seconds(work: Workload) -> float:
    """Seconds to quantize cached fp8 operands again, once a step."""
    return memory_seconds(work, _CACHED_CAST_BYTES * cached_fp8_elements(work))


def memory_seconds(work: Workload, moved_bytes: float) -> float:
    """Seconds to move `moved_bytes` bytes in device memory, reads and writes together."""
    return moved_bytes / (work.gpu.memory_rate * work.efficiency.memory)
