"""FP8 training layers: linear projections and routed experts, forward and backward, and which modules get them.

The projections of attention and of feed-forwards and the routed experts multiply in e4m3 forward, backward and for
weight gradients; the head, the embedding, the router, the norms and attention itself stay in bf16 (DeepSeek-V3, arXiv
2412.19437, section 3.3.1). Parameters and activations between layers are bf16. Kernels: model/fp8/ops.py.

Shapes: N token, K chosen experts of a token, P rows in whole blocks of 128 an expert, T = P / 128, E expert, D hidden,
F intermediate width, I and O a projection's input and output width, X = 2 F.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from model.experts import Experts, Permutation, Rows, own_part
from model.fp8.ops import (
    cast_both_,
    cast_weight,
    experts_backward,
    experts_forward,
    linear_backward,
    linear_forward,
)
from model.fp8.reference import BLOCK
from model.transformer import Block

_ALIGNED = 16


class Fp8Weight(NamedTuple):
    """Weight [E, X, D] quantized to fp8, plain and transposed, with their scales."""

    values_EXD: Tensor
    scale: Tensor
    transposed_EDX: Tensor
    transposed_scale: Tensor

    @classmethod
    def of(cls, weight_EXD: Tensor) -> Fp8Weight:
        """Quantized copies of a bf16 weight [E, X, D]."""
        return cls(*cast_weight(weight_EXD, False), *cast_weight(weight_EXD, True))

    def requantize(self, weight: Tensor) -> None:
        """Quantize a changed weight again, in place; [X, D] is taken as [1, X, D]."""
        cast_both_(weight.view(self.values_EXD.shape), *self)


class Fp8Linear(nn.Linear):
    """Linear layer without a bias, in fp8."""

    operands: Fp8Weight | None = None
    """Quantized weight that is cached across steps; `None`: every pass quantizes the weight."""

    def forward(self, input: Tensor) -> Tensor:
        """Projection of each row, bf16 [..., O]."""
        x_NI = input.flatten(0, -2)
        return fp8_linear(x_NI, self.weight, self.operands).view(*input.shape[:-1], -1)


class PaddedRows(NamedTuple):
    """Permutation of routed rows with each expert's rows padded to whole blocks of 128."""

    token_P: Tensor
    """int32, the token of each row; -1 for padding."""
    place_NK: Tensor
    """The row of each top-k slot; P for a slot routed off-rank."""
    expert_T: Tensor
    """int32, the expert of each block; -1 after the last."""
    starts_E: Tensor
    """int32 [E + 1], each expert's first block, and the end."""


def use_fp8(model: nn.Module) -> int:
    """Switch a model's blocks to fp8, in place: the modules that are wide enough and have no adapter.

    Returns:
        Number of modules in fp8.
    """
    switched = 0
    for block in (module for module in model.modules() if isinstance(module, Block)):
        routers = {module.gate for module in block.modules() if hasattr(module, "gate")}
        for module in block.modules():
            if isinstance(module, Experts):
                _, doubled, width = module.w13_EFD.shape
                fits = width % BLOCK == 0 and doubled % (2 * BLOCK) == 0
                module.fp8 = fp8_experts if fits else None
            elif type(module) is nn.Linear and module not in routers and _can_use_fp8(module):
                module.__class__ = Fp8Linear
            switched += isinstance(module, Fp8Linear) or getattr(module, "fp8", None) is not None
    return switched


def cache_fp8_weights(model: nn.Module) -> dict[nn.Parameter, Fp8Weight]:
    """Quantized weights by parameter, cached in the fp8 layers across steps; requantize one when its weight changes."""
    held: dict[nn.Parameter, Fp8Weight] = {}
    for module in model.modules():
        if isinstance(module, Fp8Linear):
            held |= {weight: Fp8Weight.of(weight.data[None]) for weight in module.parameters()}
            module.operands = held[cast(nn.Parameter, module.weight)]
        elif isinstance(module, Experts) and module.fp8 is not None:
            weights = module.w13_EFD, module.w2_EDF
            held |= {weight: Fp8Weight.of(own_part(weight.data)) for weight in weights}
            module.fp8_operands = *held[weights[0]], *held[weights[1]]
    return held


def _can_use_fp8(linear: nn.Linear) -> bool:
    """True for rows of a multiple of 16 bytes (TMA needs it), no bias, and both widths at least a scale's block."""
    widths, bias = (linear.in_features, linear.out_features), getattr(linear, "bias", None)
    return bias is None and min(widths) >= BLOCK and all(width % _ALIGNED == 0 for width in widths)


def pad_rows(permutation: Permutation, rows: Rows | None = None) -> PaddedRows:
    """Permutation with each expert's rows moved to the next whole block. P is the worst case: no shape is data.

    Args:
        rows: R where the permutation has slots without a row at its end. A function is called when all is under way
            that does not need R.
    """
    slots, experts = permutation.inverse_NK.numel(), permutation.counts_E.shape[0]
    blocks = -(-slots // BLOCK) + experts
    blocks_E = (permutation.counts_E + BLOCK - 1) // BLOCK
    ends_E = blocks_E.cumsum(0)
    shift_E = BLOCK * (ends_E - blocks_E) - (permutation.counts_E.cumsum(0) - permutation.counts_E)
    place_NK = permutation.inverse_NK + torch.cat([shift_E, shift_E.new_zeros(1)])[permutation.experts_NK]
    place_NK = torch.where(permutation.experts_NK < experts, place_NK, BLOCK * blocks)
    token_NK = torch.arange(len(place_NK), device=place_NK.device, dtype=torch.int32)[:, None].expand_as(place_NK)
    token_P = torch.full((BLOCK * blocks + 1,), -1, device=place_NK.device, dtype=torch.int32)
    token_P = token_P.scatter(0, place_NK.flatten(), token_NK.flatten())[:-1]
    expert_T = torch.searchsorted(ends_E, torch.arange(blocks, device=ends_E.device), right=True)
    expert_T = torch.where(expert_T < experts, expert_T, -1).to(torch.int32)
    starts_E = torch.cat([ends_E.new_zeros(1), ends_E]).to(torch.int32)
    count = permutation.order_R.shape[0] if rows is None else rows() if callable(rows) else rows
    if count < slots:
        blocks = -(-count // BLOCK) + experts
        place_NK = place_NK.clamp(max=BLOCK * blocks)
        token_P, expert_T = token_P[: BLOCK * blocks], expert_T[:blocks]
    return PaddedRows(token_P, place_NK, expert_T, starts_E)


def fp8_linear(x_NI: Tensor, weight_OI: Tensor, operands: Fp8Weight | None = None) -> Tensor:
    """Product of x and the transposed weight, bf16 [N, O].

    Args:
        operands: the quantized weight; `None` quantizes in each pass. Kept from forward to backward it would outlive
            the parameters that FSDP all-gathers.
    """
    return cast(Tensor, _Linear.apply(x_NI, weight_OI, *(operands or ())))  # type: ignore[no-untyped-call]


def fp8_experts(
    x_ND: Tensor,
    weight_NK: Tensor,
    permutation: Permutation,
    w13_EXD: Tensor,
    w2_EDF: Tensor,
    operands: tuple[Tensor, ...] = (),
    rows: Rows | None = None,
) -> Tensor:
    """Sum over each token's top-k slots of weight * expert(x) [N, D], as `model.experts.run_permuted` with SwiGLUs.

    Args:
        operands: fields of w13's `Fp8Weight`, then of w2's; without them weights are quantized in each pass.
        rows: as for `pad_rows`.
    """
    padded = pad_rows(permutation, rows)
    return cast(Tensor, _Experts.apply(x_ND, weight_NK, *padded, w13_EXD, w2_EDF, *operands))  # type: ignore[no-untyped-call]


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_NI: Tensor, weight_OI: Tensor, *operands: Tensor) -> Tensor:
        made = linear_forward(x_NI, *(operands[:2] or cast_weight(weight_OI[None], False)))
        ctx.held = len(operands)
        ctx.save_for_backward(*(operands[2:] or (weight_OI,)), *made[1:])
        return made[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        *weights, x_IN, x_scale = ctx.saved_tensors
        transposed = weights if ctx.held else cast_weight(weights[0][None], True)
        trained = ctx.needs_input_grad[1]
        grad_x_NI, grad_OI = linear_backward(grads[0].contiguous(), *transposed, x_IN, x_scale, trained)
        return grad_x_NI, grad_OI if trained else None, *[None] * ctx.held


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_ND: Tensor,
        weight_NK: Tensor,
        token_P: Tensor,
        place_NK: Tensor,
        expert_T: Tensor,
        starts_E: Tensor,
        w13_EXD: Tensor,
        w2_EDF: Tensor,
        *operands: Tensor,
    ) -> Tensor:
        weight_P = weight_NK.new_zeros(token_P.shape[0] + 1, dtype=torch.float32)
        weight_P = weight_P.scatter(0, place_NK.flatten(), weight_NK.flatten().float())[:-1]
        plain, transposed = (*operands[:2], *operands[4:6]), (*operands[2:4], *operands[6:])
        weights = plain or _cast(w13_EXD, w2_EDF, False)
        made = experts_forward(x_ND, weight_P, token_P, place_NK, expert_T, *weights)
        ctx.weight_dtype, ctx.held = weight_NK.dtype, len(operands)
        rows = weight_P, token_P, place_NK, expert_T, starts_E
        ctx.save_for_backward(*rows, *made[1:], *(transposed or (w13_EXD, w2_EDF)))
        return made[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        kept = ctx.saved_tensors  # read once: activation recompute hands them out once
        rows, made, weights = kept[:5], kept[5:8], kept[8:]
        transposed = weights if ctx.held else _cast(weights[0], weights[1], True)
        trained = ctx.needs_input_grad[6]
        backward = grads[0].contiguous(), *rows, *transposed, *made, trained
        grad_x_ND, grad_weight_P, *grad_weights = experts_backward(*backward)
        padded = torch.cat([grad_weight_P, grad_weight_P.new_zeros(1)])
        place_NK = rows[2]
        grad_weight_NK = padded[place_NK].to(ctx.weight_dtype)
        return (
            grad_x_ND,
            grad_weight_NK,
            None,
            None,
            None,
            None,
            *(grad_weights if trained else [None] * 2),
            *[None] * ctx.held,
        )


def _cast(w13_EXD: Tensor, w2_EDF: Tensor, transposed: bool) -> tuple[Tensor, ...]:
    return *cast_weight(w13_EXD, transposed), *cast_weight(w2_EDF, transposed)
