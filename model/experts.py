"""Owns the routed experts' arithmetic: rows sorted by expert, grouped matmuls, and the way there and back.

It knows nothing of how experts are chosen.

Shapes: N token, K chosen experts of a token, R = N K routed rows in expert order, E expert, D hidden,
F expert's intermediate width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

RunExperts = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Rows [R, D] in expert order, what each is multiplied with [R], and rows of each expert -> [R, D]."""


class Dispatch(NamedTuple):
    """Where each routed row comes from and goes to. A choice whose expert is not here has no row."""

    token_R: Tensor
    """The token of each row."""
    order_R: Tensor
    """The flat (token, choice) position of each row."""
    inverse_NK: Tensor
    """The row of each choice; R where it has none."""
    counts_E: Tensor
    """Rows of each expert, int64."""
    experts_NK: Tensor
    """The expert of each choice; E where it has no row."""


Spread = Callable[[RunExperts, Tensor, Tensor, Dispatch], Tensor]
"""As `through_experts`, on the ranks that hold the experts: takes tokens there, and what becomes of them back."""


def plan_dispatch(experts_NK: Tensor, counts_E: Tensor, rows: int | None = None) -> Dispatch:
    """Sort the (token, choice) pairs by expert; stable, so the order never varies between runs.

    Args:
        experts_NK: E = len(counts_E) where a choice has no row.
        rows: R, where it is not N K.
    """
    # A radix sort takes one pass a byte of its keys.
    one_byte = counts_E.shape[0] + (rows is not None) <= 256
    key_R = experts_NK.flatten().to(torch.uint8) if one_byte else experts_NK.flatten()
    order_R = key_R.argsort(stable=True)[:rows]
    place_R = torch.arange(order_R.shape[0], device=order_R.device)
    # Without `rows` all places are written; else those of choices without a row stay R.
    inverse_R = torch.empty_like(order_R) if rows is None else order_R.new_full((experts_NK.numel(),), rows)
    inverse_NK = inverse_R.scatter_(0, order_R, place_R).view_as(experts_NK)
    return Dispatch(order_R // experts_NK.shape[1], order_R, inverse_NK, counts_E, experts_NK)


def through_experts(run: RunExperts, x_ND: Tensor, weight_NK: Tensor, dispatch: Dispatch) -> Tensor:
    """Sum over each token's choices that have a row of weight * expert(x): rows out, through `run`, and back."""
    rows_RD = spread_rows(x_ND, dispatch)
    weight_R = weight_NK.flatten().gather(0, dispatch.order_R)
    return gather_rows(run(rows_RD, weight_R, dispatch.counts_E), dispatch)


def spread_rows(x_ND: Tensor, dispatch: Dispatch) -> Tensor:
    """Each token's row at each of its places [R, D]."""
    return cast(Tensor, _Spread.apply(x_ND, dispatch.token_R, dispatch.inverse_NK))  # type: ignore[no-untyped-call]


def gather_rows(rows_RD: Tensor, dispatch: Dispatch) -> Tensor:
    """The sum of each token's rows [N, D]."""
    return cast(Tensor, _Gather.apply(rows_RD, dispatch.token_R, dispatch.inverse_NK))  # type: ignore[no-untyped-call]


class _Spread(torch.autograd.Function):
    """Copy each token's row to its places. The gradient is a gather and a sum: no atomic adds, so repeatable."""

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, token_R: Tensor, inverse_NK: Tensor) -> Tensor:
        ctx.save_for_backward(inverse_NK)
        return x_ND.index_select(0, token_R)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (inverse_NK,) = ctx.saved_tensors
        return _sum_choices(grads[0], inverse_NK), None, None


class _Gather(torch.autograd.Function):
    """Sum each token's rows: the transpose of `_Spread`, so its gradient is a plain gather."""

    @staticmethod
    def forward(ctx: Any, rows_RD: Tensor, token_R: Tensor, inverse_NK: Tensor) -> Tensor:
        ctx.save_for_backward(token_R)
        return _sum_choices(rows_RD, inverse_NK)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (token_R,) = ctx.saved_tensors
        return grads[0].index_select(0, token_R), None, None


def _sum_choices(rows_RD: Tensor, inverse_NK: Tensor) -> Tensor:
    """The sum of each token's rows [N, D]; a place of R adds nothing."""
    if rows_RD.is_cuda:
        from model.triton_experts import sum_choices

        return sum_choices(rows_RD, inverse_NK)
    if rows_RD.shape[0] < inverse_NK.numel():
        rows_RD = F.pad(rows_RD, (0, 0, 0, 1))
    return rows_RD.index_select(0, inverse_NK.flatten()).view(*inverse_NK.shape, rows_RD.shape[-1]).sum(1)


def in_order(counts_E: Tensor, rows: int) -> Dispatch:
    """Of rows that lie in expert order already, each a token with one choice."""
    place_R = torch.arange(rows, device=counts_E.device)
    experts_R = torch.arange(len(counts_E), device=counts_E.device).repeat_interleave(counts_E, output_size=rows)
    return Dispatch(place_R, place_R, place_R[:, None], counts_E, experts_R[:, None])


class Experts(nn.Module):
    """The routed experts of one layer, each a SwiGLU, as two fused weights."""

    spread: Spread | None = None
    """Set where this process holds only some of the experts."""
    fp8: Callable[[Tensor, Tensor, Dispatch, Tensor, Tensor, tuple[Tensor, ...]], Tensor] | None = None
    """Set where they multiply in fp8: as `through_experts`, with w13, w2 and what follows."""
    fp8_operands: tuple[Tensor, ...] = ()
    """Of w13 and w2, where they are kept from step to step."""

    def __init__(self, experts: int, width: int, intermediate: int) -> None:
        super().__init__()
        self.w13_EFD = nn.Parameter(torch.empty(experts, 2 * intermediate, width))
        self.w2_EDF = nn.Parameter(torch.empty(experts, width, intermediate))
        self.loop = looped_experts
        """Kept out of the graph where blocks are compiled: the counts are data."""

    def forward(self, x_ND: Tensor, weight_NK: Tensor, dispatch: Dispatch) -> Tensor:
        """Sum over each token's choices of weight * expert(x), in x's type (autocast's under autocast).

        The weight is applied before the down projection, where rows are narrowest; the two orders are equal
        because that projection is linear.
        """
        dtype = torch.get_autocast_dtype(x_ND.device.type) if torch.is_autocast_enabled(x_ND.device.type) else None
        x_ND = x_ND.to(dtype or x_ND.dtype)
        if self.fp8 is not None and self.spread is None:
            return self.fp8(x_ND, weight_NK, dispatch, *self._weights(x_ND.dtype), self.fp8_operands)
        spread = self.spread or through_experts
        return spread(self.run, x_ND, weight_NK, dispatch)

    def run(self, rows_RD: Tensor, weight_R: Tensor, counts_E: Tensor) -> Tensor:
        """Each row through its expert: grouped matmuls where the device has them, else one expert at a time."""
        w13_EFD, w2_EDF = self._weights(rows_RD.dtype)
        if self.fp8 is not None:
            in_place = in_order(counts_E, rows_RD.shape[0])
            return self.fp8(rows_RD, weight_R[:, None], in_place, w13_EFD, w2_EDF, self.fp8_operands)
        if can_group(rows_RD, w13_EFD, w2_EDF):
            return grouped_experts(rows_RD, weight_R, counts_E, w13_EFD, w2_EDF)
        return self.loop(rows_RD, weight_R, counts_E, w13_EFD, w2_EDF)

    def _weights(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return _own(self.w13_EFD).to(dtype), _own(self.w2_EDF).to(dtype)


def _own(weight: Tensor) -> Tensor:
    """The experts that this process holds: of a DTensor (whose import takes a second) the local part."""
    to_local = getattr(weight, "to_local", None)
    return weight if to_local is None else cast(Tensor, to_local())


def can_group(rows_RD: Tensor, w13_EFD: Tensor, w2_EDF: Tensor) -> bool:
    """Whether `torch._grouped_mm` takes these: bf16 on CUDA, row strides in multiples of 16 bytes.

    On a CPU the loop is faster at up to 16 experts, and bf16 grouped 6 to 18 times slower (torch 2.13, 2026-11).
    """
    aligned = w13_EFD.shape[-1] % 8 == 0 and w2_EDF.shape[-1] % 8 == 0
    return rows_RD.is_cuda and rows_RD.dtype == torch.bfloat16 and aligned


def grouped_experts(rows_RD: Tensor, weight_R: Tensor, counts_E: Tensor, w13_EFD: Tensor, w2_EDF: Tensor) -> Tensor:
    """All experts in two grouped matmuls. The offsets end at R, so no row is left uninitialised.

    An expert without rows gets a weight gradient of zeros on Hopper. On Blackwell the kernel returns something else
    (pytorch issue 172439, open in 2026-11): mask it before training there.
    """
    ends_E = counts_E.cumsum(0).to(torch.int32)
    return cast(Tensor, _Grouped.apply(rows_RD, weight_R, ends_E, w13_EFD, w2_EDF))  # type: ignore[no-untyped-call]


class _Grouped(torch.autograd.Function):
    """Experts by grouped matmuls. The activation is not kept: the backward's one kernel makes it again."""

    @staticmethod
    def forward(ctx: Any, rows_RD: Tensor, weight_R: Tensor, ends_E: Tensor, w13_EFD: Tensor, w2_EDF: Tensor) -> Tensor:
        h_RX = torch._grouped_mm(rows_RD, w13_EFD.transpose(-2, -1), offs=ends_E)
        act_RF = _gated(h_RX, weight_R)
        ctx.save_for_backward(rows_RD, weight_R, ends_E, w13_EFD, w2_EDF, h_RX)
        return torch._grouped_mm(act_RF, w2_EDF.transpose(-2, -1), offs=ends_E)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows_RD, weight_R, ends_E, w13_EFD, w2_EDF, h_RX = ctx.saved_tensors
        trained = ctx.needs_input_grad[3]  # or adapters are, elsewhere
        grad_RD = grads[0].contiguous()
        grad_act_RF = torch._grouped_mm(grad_RD, w2_EDF, offs=ends_E)
        act_RF, grad_h_RX, grad_weight_R = _gated_backward(h_RX, weight_R, grad_act_RF)
        grad_w2_EDF = torch._grouped_mm(grad_RD.t(), act_RF, offs=ends_E) if trained else None
        grad_rows_RD = torch._grouped_mm(grad_h_RX, w13_EFD, offs=ends_E)
        grad_w13_EFD = torch._grouped_mm(grad_h_RX.t(), rows_RD, offs=ends_E) if trained else None
        return grad_rows_RD, grad_weight_R.to(weight_R.dtype), None, grad_w13_EFD, grad_w2_EDF


def _gated(h_RX: Tensor, weight_R: Tensor) -> Tensor:
    """silu(gate) * up * weight of rows that hold gate, then up; in fp32, rounded once."""
    if h_RX.is_cuda:
        from model.triton_experts import swiglu_forward

        return swiglu_forward(h_RX, weight_R)
    gate_RF, up_RF = h_RX.float().chunk(2, dim=-1)
    return (F.silu(gate_RF) * up_RF * weight_R[:, None]).to(h_RX.dtype)


def _gated_backward(h_RX: Tensor, weight_R: Tensor, grad_RF: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """From the gradient of `_gated`: its result again, and the gradients of its two arguments (the second in fp32)."""
    if h_RX.is_cuda:
        from model.triton_experts import swiglu_backward

        return swiglu_backward(h_RX, weight_R, grad_RF)
    gate_RF, up_RF = h_RX.float().chunk(2, dim=-1)
    share_RF, grad = gate_RF.sigmoid(), grad_RF.float()
    silu_RF, weighted_RF = gate_RF * share_RF, grad * weight_R[:, None]
    grad_gate_RF = weighted_RF * up_RF * share_RF * (1.0 + gate_RF * (1.0 - share_RF))
    grad_h_RX = torch.cat([grad_gate_RF, weighted_RF * silu_RF], dim=-1).to(h_RX.dtype)
    act_RF = (silu_RF * up_RF * weight_R[:, None]).to(h_RX.dtype)
    return act_RF, grad_h_RX, (grad * silu_RF * up_RF).sum(dim=-1)


def looped_experts(rows_RD: Tensor, weight_R: Tensor, counts_E: Tensor, w13_EFD: Tensor, w2_EDF: Tensor) -> Tensor:
    """One expert after the other; an expert without rows costs nothing and gets a gradient of zeros."""
    counts = counts_E.tolist()
    weight_R = weight_R.to(rows_RD.dtype)
    parts = []
    pieces = zip(
        torch.split(rows_RD, counts), torch.split(weight_R, counts), w13_EFD.unbind(), w2_EDF.unbind(), strict=True
    )
    for x_RD, scale_R, w13_FD, w2_DF in pieces:
        if x_RD.shape[0]:
            gate_RF, up_RF = F.linear(x_RD, w13_FD).chunk(2, dim=-1)
            parts.append(F.linear(F.silu(gate_RF) * up_RF * scale_R[:, None], w2_DF))
    return torch.cat(parts)
