"""Custom operators of fp8 layers: forward and backward passes of linear layers and routed experts, in torch.library.

torch.compile sees each pass as one operator, neither its kernels nor their TMA descriptors. Modules and autograd:
model/fp8/linear.py.

Shapes: N token, K chosen experts of a token, P rows in whole blocks of 128 an expert, T = P / 128, E expert, D hidden,
F intermediate width, X = 2 F, I and O a projection's input and output width.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import cast

import torch
from torch import Tensor

from model.fp8 import reference
from model.fp8.reference import BLOCK

# Not torch.library.custom_op: its checks of every call take longer than launching the call's kernels.
_library = torch.library.Library("cherry", "FRAGMENT")  # type: ignore[no-untyped-call]
_Run = Callable[..., tuple[Tensor, ...]]


def _operator(schema: str, fake: _Run) -> Callable[[_Run], _Run]:
    """Decorator that registers a function as operator for CUDA, its namesake in model/fp8/reference.py for the CPU.

    Args:
        schema: the operator's, as torch.library.define takes it.
        fake: returns empty tensors of the results' shapes and types.
    """

    def register(run: _Run) -> _Run:
        name = schema.partition("(")[0]
        _library.define(schema)  # type: ignore[no-untyped-call]
        _library.impl(name, run, "CUDA")  # type: ignore[no-untyped-call]
        _library.impl(name, getattr(reference, run.__name__), "CPU")  # type: ignore[no-untyped-call]
        torch.library.register_fake(f"cherry::{name}", fake, lib=_library)
        return cast(_Run, getattr(torch.ops.cherry, name).default)

    return register


def _transposed_like(x_ND: Tensor, blocks: int) -> tuple[Tensor, Tensor]:
    width = x_ND.shape[1]
    values = x_ND.new_empty(width, BLOCK * blocks, dtype=torch.float8_e4m3fn)
    return values, x_ND.new_empty(blocks, width, dtype=torch.float32)


@_operator(
    "fp8_cast_weight(Tensor weight, bool transposed) -> (Tensor, Tensor)",
    lambda weight, transposed: (
        weight.new_empty(weight.shape[0], *weight.shape[1:][:: -1 if transposed else 1], dtype=torch.float8_e4m3fn),
        weight.new_empty(weight.shape[0], *_blocks(weight)[:: -1 if transposed else 1], dtype=torch.float32),
    ),
)
def cast_weight(weight_EXD: Tensor, transposed: bool) -> tuple[Tensor, ...]:
    """Values and scales of quantized weights, plain [E, X, D] or transposed [E, D, X]."""
    from model.fp8 import cast_kernels

    return cast_kernels.cast_weight(weight_EXD, transposed=transposed)


def cast_both_(
    weight_EXD: Tensor, values_EXD: Tensor, scale: Tensor, transposed_EDX: Tensor, transposed_scale: Tensor
) -> None:
    """Quantize a weight into the given plain and transposed tensors; not registered as an operator."""
    if weight_EXD.is_cuda:
        from model.fp8 import cast_kernels

        cast_kernels.cast_both_(weight_EXD, values_EXD, scale, transposed_EDX, transposed_scale)
        return
    for transposed, kept in ((False, (values_EXD, scale)), (True, (transposed_EDX, transposed_scale))):
        for old, new in zip(kept, reference.cast_weight(weight_EXD, transposed), strict=True):
            old.copy_(new)


def _blocks(weight_EXD: Tensor) -> tuple[int, int]:
    return -(-weight_EXD.shape[1] // BLOCK), -(-weight_EXD.shape[2] // BLOCK)


@_operator(
    "fp8_linear_forward(Tensor x, Tensor weight, Tensor scale) -> (Tensor, Tensor, Tensor)",
    lambda x, weight, _: (x.new_empty(x.shape[0], weight.shape[1]), *_transposed_like(x, -(-x.shape[0] // BLOCK))),
)
def linear_forward(x_NI: Tensor, weight_1OI: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
    """Product [N, O], and x transposed [I, 128 ceil(N / 128)] with its scales, for the weight's gradient."""
    from model.fp8 import cast_kernels, gemm_hopper

    plain, transposed = cast_kernels.cast(x_NI.contiguous())
    group_T = _one_group(-(-x_NI.shape[0] // BLOCK), x_NI.device)
    return gemm_hopper.multiply_rows(*plain, weight_1OI, scale, group_T), *transposed


@_operator(
    "fp8_linear_backward(Tensor grad, Tensor weight, Tensor scale, Tensor x, Tensor x_scale, bool trained)"
    " -> (Tensor, Tensor)",
    lambda grad, weight, scale, x, x_scale, trained: (
        grad.new_empty(grad.shape[0], weight.shape[1]),
        grad.new_empty(weight.shape[2], weight.shape[1]) if trained else grad.new_empty(0),
    ),
)
def linear_backward(
    grad_NO: Tensor, weight_1IO: Tensor, scale: Tensor, x_IN: Tensor, x_scale: Tensor, trained: bool
) -> tuple[Tensor, ...]:
    """Gradients of x [N, I] and of the weight [O, I] (empty if not `trained`)."""
    from model.fp8 import cast_kernels, gemm_hopper

    plain, transposed = cast_kernels.cast(grad_NO)
    blocks, device = x_scale.shape[0], x_IN.device
    grad_x_NI = gemm_hopper.multiply_rows(*plain, weight_1IO, scale, _one_group(blocks, device))
    if not trained:
        return grad_x_NI, grad_NO.new_empty(0)
    return grad_x_NI, gemm_hopper.weight_gradients(*transposed, x_IN, x_scale, _one_start(blocks, device))[0]


@_operator(
    "fp8_experts_forward(Tensor x, Tensor weight, Tensor token, Tensor place, Tensor expert, Tensor w13,"
    " Tensor w13_scale, Tensor w2, Tensor w2_scale) -> (Tensor, Tensor, Tensor, Tensor)",
    lambda x, weight, token, place, expert, w13, *_: (
        torch.empty_like(x),
        *_transposed_like(x, expert.shape[0]),
        x.new_empty(token.shape[0], w13.shape[1]),
    ),
)
def experts_forward(
    x_ND: Tensor,
    weight_P: Tensor,
    token_P: Tensor,
    place_NK: Tensor,
    expert_T: Tensor,
    w13_EXD: Tensor,
    w13_scale: Tensor,
    w2_EDF: Tensor,
    w2_scale: Tensor,
) -> tuple[Tensor, ...]:
    """Combined outputs [N, D]; for the backward pass, rows transposed, their scales, and gate and up [P, X]."""
    from model import triton_experts
    from model.fp8 import cast_kernels, gemm_hopper

    rows, transposed = cast_kernels.cast(x_ND.contiguous(), token_P, expert_T)
    h_PX = gemm_hopper.multiply_rows(*rows, w13_EXD, w13_scale, expert_T)
    act = cast_kernels.swiglu(h_PX, weight_P, expert_T)
    rows_PD = gemm_hopper.multiply_rows(*act, w2_EDF, w2_scale, expert_T)
    return triton_experts.sum_topk(rows_PD, place_NK), *transposed, h_PX


@_operator(
    "fp8_experts_backward(Tensor grad, Tensor weight, Tensor token, Tensor place, Tensor expert, Tensor starts,"
    " Tensor w13, Tensor w13_scale, Tensor w2, Tensor w2_scale, Tensor x, Tensor x_scale, Tensor h, bool trained)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    lambda grad, weight, token, place, expert, starts, w13, w13_scale, w2, w2_scale, x, x_scale, h, trained: (
        torch.empty_like(grad),
        torch.empty_like(weight),
        grad.new_empty(w13.shape[0], w13.shape[2], w13.shape[1]) if trained else grad.new_empty(0),
        grad.new_empty(w2.shape[0], w2.shape[2], w2.shape[1]) if trained else grad.new_empty(0),
    ),
)
def experts_backward(
    grad_ND: Tensor,
    weight_P: Tensor,
    token_P: Tensor,
    place_NK: Tensor,
    expert_T: Tensor,
    starts_E: Tensor,
    w13_EDX: Tensor,
    w13_scale: Tensor,
    w2_EFD: Tensor,
    w2_scale: Tensor,
    x_DP: Tensor,
    x_scale: Tensor,
    h_PX: Tensor,
    trained: bool,
) -> tuple[Tensor, ...]:
    """Gradients of x [N, D], of row weights [P] (undefined for padding), of w13 and w2 (empty if not `trained`)."""
    from model import triton_experts
    from model.fp8 import cast_kernels, gemm_hopper

    rows, transposed = cast_kernels.cast(grad_ND, token_P, expert_T)
    grad_act_PF = gemm_hopper.multiply_rows(*rows, w2_EFD, w2_scale, expert_T)
    act, grad_h, grad_h_transposed, grad_weight_P = cast_kernels.swiglu_backward(h_PX, weight_P, expert_T, grad_act_PF)
    grad_w13_EXD, grad_w2_EDF = grad_ND.new_empty(0), grad_ND.new_empty(0)
    if trained:
        grad_w2_EDF = gemm_hopper.weight_gradients(*transposed, *act, starts_E)
        grad_w13_EXD = gemm_hopper.weight_gradients(*grad_h_transposed, x_DP, x_scale, starts_E)
    grad_rows_PD = gemm_hopper.multiply_rows(*grad_h, w13_EDX, w13_scale, expert_T)
    return triton_experts.sum_topk(grad_rows_PD, place_NK), grad_weight_P, grad_w13_EXD, grad_w2_EDF


@lru_cache
def _one_group(blocks: int, device: torch.device) -> Tensor:
    """Group index of each block [T], int32, where there is only one group."""
    return torch.zeros(blocks, dtype=torch.int32, device=device)


@lru_cache
def _one_start(blocks: int, device: torch.device) -> Tensor:
    """First block and end of the only group [2], int32."""
    return torch.tensor([0, blocks], dtype=torch.int32, device=device)
