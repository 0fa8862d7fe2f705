"""Routed experts: permute tokens by expert, grouped matmuls, unpermute (combine) over each token's top-k slots.

The router is in model/moe.py; expert parallel dispatch between ranks in cherry/distributed/expert_parallel.py.

Shapes: N token, K top-k slot of a token, R = N K routed rows in expert order, E expert, D hidden,
F expert's intermediate width, X = 2 F.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

RunExperts = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Function of rows [R, D] in expert order, their routing weights [R] and the rows of each expert [E] -> [R, D]."""


Rows = int | Callable[[], int]
"""A number of rows, or a function that waits for it."""


class Permutation(NamedTuple):
    """Permutation of (token, top-k slot) pairs into expert order. A slot routed off-rank has no row."""

    token_R: Tensor
    """The token of each row."""
    order_R: Tensor
    """The flat (token, slot) position of each row."""
    inverse_NK: Tensor
    """The row of each slot; R or more for a slot without a row."""
    counts_E: Tensor
    """Rows of each expert, int64."""
    experts_NK: Tensor
    """The expert of each slot; E for a slot without a row."""


class TokenDispatcher(Protocol):
    """Expert parallelism: brings tokens to the ranks that hold their experts, and the outputs back.

    The layer calls the three in this order, with other work between them that may hide what they send.
    """

    def send(self, x_ND: Tensor) -> Tensor:
        """Tokens for `__call__`, which may be on their way already."""
        ...

    def __call__(
        self, experts: Experts, sent: Tensor, weight_NK: Tensor, experts_NK: Tensor, counts_E: Tensor
    ) -> Tensor:
        """Outputs for `receive`, which may be on their way back; `experts` are those of this rank."""
        ...

    def receive(self, out: Tensor) -> Tensor:
        """Sum over each token's top-k slots of weight * expert(x) [N, D]."""
        ...

    def count_bytes(self, on_bytes_sent: Callable[[int], None]) -> None:
        """Call `on_bytes_sent` with the bytes that go to other ranks, each time some do."""
        ...


def permutation_by_expert(
    experts_NK: Tensor, counts_E: Tensor, rows: Rows | None = None, *, elsewhere: bool = False
) -> Permutation:
    """Permutation that sorts (token, slot) pairs by expert; stable, so the order is deterministic.

    Args:
        experts_NK: the expert of each slot; E = len(counts_E) for a slot without a row.
        rows: R, where it is not N K. A function is called when all that does not need R is under way.
        elsewhere: there may be slots without a row although `rows` is not given: they come last.
    """
    # A radix sort takes one pass a byte of its keys.
    one_byte = counts_E.shape[0] + (elsewhere or rows is not None) <= 256
    key = experts_NK.flatten().to(torch.uint8) if one_byte else experts_NK.flatten()
    order = key.argsort(stable=True)
    place = torch.arange(order.shape[0], device=order.device)
    # Slots without a row come last, so their places are R and above.
    inverse_NK = torch.empty_like(order).scatter_(0, order, place).view_as(experts_NK)
    token = order // experts_NK.shape[1]
    count = rows() if callable(rows) else rows
    return Permutation(token[:count], order[:count], inverse_NK, counts_E, experts_NK)


def run_permuted(run: RunExperts, x_ND: Tensor, weight_NK: Tensor, permutation: Permutation) -> Tensor:
    """Sum over each token's top-k slots of weight * expert(x) [N, D]: permute, `run`, unpermute."""
    rows_RD = permute(x_ND, permutation)
    weight_R = weight_NK.flatten().gather(0, permutation.order_R)
    return unpermute(run(rows_RD, weight_R, permutation.counts_E), permutation)


def permute(x_ND: Tensor, permutation: Permutation) -> Tensor:
    """Rows in expert order [R, D]: a copy of each token for each of its slots."""
    return cast(Tensor, _Permute.apply(x_ND, permutation.token_R, permutation.inverse_NK))  # type: ignore[no-untyped-call]


def unpermute(rows_RD: Tensor, permutation: Permutation) -> Tensor:
    """Sum of each token's rows [N, D], back in token order (the combine)."""
    return cast(Tensor, _Unpermute.apply(rows_RD, permutation.token_R, permutation.inverse_NK))  # type: ignore[no-untyped-call]


class _Permute(torch.autograd.Function):
    """Copy each token to its rows. The gradient is a gather and a sum: no atomic adds, so deterministic."""

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, token_R: Tensor, inverse_NK: Tensor) -> Tensor:
        ctx.save_for_backward(inverse_NK)
        return x_ND.index_select(0, token_R)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (inverse_NK,) = ctx.saved_tensors
        return sum_topk(grads[0], inverse_NK), None, None


class _Unpermute(torch.autograd.Function):
    """Sum each token's rows: the transpose of `_Permute`, so its gradient is a gather."""

    @staticmethod
    def forward(ctx: Any, rows_RD: Tensor, token_R: Tensor, inverse_NK: Tensor) -> Tensor:
        ctx.save_for_backward(token_R)
        return sum_topk(rows_RD, inverse_NK)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (token_R,) = ctx.saved_tensors
        return grads[0].index_select(0, token_R), None, None


def sum_topk(rows_RD: Tensor, inverse_NK: Tensor) -> Tensor:
    """Sum over top-k slots of each token's rows [N, D]; an index of R or more adds nothing."""
    if rows_RD.is_cuda:
        from model import triton_experts

        return triton_experts.sum_topk(rows_RD, inverse_NK)
    rows = rows_RD.shape[0]
    if rows < inverse_NK.numel():
        rows_RD, inverse_NK = F.pad(rows_RD, (0, 0, 0, 1)), inverse_NK.clamp(max=rows)
    return rows_RD.index_select(0, inverse_NK.flatten()).view(*inverse_NK.shape, rows_RD.shape[-1]).sum(1)


def identity_permutation(counts_E: Tensor, rows: int) -> Permutation:
    """Permutation of `rows` tokens with one slot each that are in expert order already."""
    place_R = torch.arange(rows, device=counts_E.device)
    experts_R = torch.arange(len(counts_E), device=counts_E.device).repeat_interleave(counts_E, output_size=rows)
    return Permutation(place_R, place_R, place_R[:, None], counts_E, experts_R[:, None])


class Experts(nn.Module):
    """The routed experts of one layer, each a SwiGLU, as two fused weights."""

    dispatcher: TokenDispatcher | None = None
    """Set under expert parallelism: this rank holds only some of the experts."""
    fp8: Callable[..., Tensor] | None = None
    """Set for fp8 training: `model.fp8.linear.fp8_experts`."""
    fp8_operands: tuple[Tensor, ...] = ()
    """Quantized w13 and w2, where they are cached across steps."""

    def __init__(self, experts: int, width: int, intermediate: int) -> None:
        super().__init__()
        self.w13_EFD = nn.Parameter(torch.empty(experts, 2 * intermediate, width))
        self.w2_EDF = nn.Parameter(torch.empty(experts, width, intermediate))
        self.loop = looped_experts
        """`looped_experts`; excluded from compilation where blocks are compiled, because the counts are data."""

    def send(self, x_ND: Tensor) -> Tensor:
        """Tokens for `forward`, in x's type (autocast's under autocast): on their way to other ranks' experts."""
        dtype = torch.get_autocast_dtype(x_ND.device.type) if torch.is_autocast_enabled(x_ND.device.type) else None
        x_ND = x_ND.to(dtype or x_ND.dtype)
        return x_ND if self.dispatcher is None else self.dispatcher.send(x_ND)

    def forward(self, sent: Tensor, weight_NK: Tensor, experts_NK: Tensor, counts_E: Tensor) -> Tensor:
        """Outputs for `receive`, of tokens that were sent.

        Args:
            counts_E: this rank's rows of each expert, int64.
        """
        if self.dispatcher is not None:
            return self.dispatcher(self, sent, weight_NK, experts_NK, counts_E)
        return self.run_routed(sent, weight_NK, experts_NK, counts_E)

    def receive(self, out: Tensor) -> Tensor:
        """Sum over each token's top-k slots of weight * expert(x) [N, D]."""
        return out if self.dispatcher is None else self.dispatcher.receive(out)

    def run_routed(
        self, x_ND: Tensor, weight_NK: Tensor, experts_NK: Tensor, counts_E: Tensor, rows: Rows | None = None
    ) -> Tensor:
        """Sum over each token's rows of weight * expert(x) [N, D] by the experts of this rank.

        The weight is applied before the down projection, where rows are narrowest; the two orders are equal
        because that projection is linear.

        Args:
            experts_NK, counts_E, rows: as for `permutation_by_expert`.
        """
        if self.fp8 is not None:
            weights = *self._weights(x_ND.dtype), self.fp8_operands
            permutation = permutation_by_expert(experts_NK, counts_E, elsewhere=rows is not None)
            return self.fp8(x_ND, weight_NK, permutation, *weights, rows)
        return run_permuted(self.run, x_ND, weight_NK, permutation_by_expert(experts_NK, counts_E, rows))

    def run(self, rows_RD: Tensor, weight_R: Tensor, counts_E: Tensor) -> Tensor:
        """Expert outputs [R, D] of rows in expert order: grouped matmuls where available, else one expert at a time."""
        if not rows_RD.shape[0]:  # kernels need a row, and under expert parallelism every rank needs gradients
            return self.run(F.pad(rows_RD, (0, 0, 0, 1)), F.pad(weight_R, (0, 1)), _one_row(counts_E))[:0]
        w13_EFD, w2_EDF = self._weights(rows_RD.dtype)
        if self.fp8 is not None:
            identity = identity_permutation(counts_E, rows_RD.shape[0])
            return self.fp8(rows_RD, weight_R[:, None], identity, w13_EFD, w2_EDF, self.fp8_operands)
        if can_group(rows_RD, w13_EFD, w2_EDF):
            return grouped_experts(rows_RD, weight_R, counts_E, w13_EFD, w2_EDF)
        return self.loop(rows_RD, weight_R, counts_E, w13_EFD, w2_EDF)

    def _weights(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return own_part(self.w13_EFD).to(dtype), own_part(self.w2_EDF).to(dtype)


def _one_row(counts_E: Tensor) -> Tensor:
    one_E = torch.zeros_like(counts_E)
    one_E[0] = 1
    return one_E


def own_part(weight: Tensor) -> Tensor:
    """Local shard of a weight: the experts that this rank holds. Importing DTensor to ask would take a second."""
    to_local = getattr(weight, "to_local", None)
    return weight if to_local is None else cast(Tensor, to_local())


def can_group(rows_RD: Tensor, w13_EFD: Tensor, w2_EDF: Tensor) -> bool:
    """True for inputs that `torch._grouped_mm` takes: bf16 on CUDA, row strides in multiples of 16 bytes.

    On a CPU the loop is faster at up to 16 experts, and bf16 grouped 6 to 18 times slower (torch 2.13, 2026-11).
    """
    aligned = w13_EFD.shape[-1] % 8 == 0 and w2_EDF.shape[-1] % 8 == 0
    return rows_RD.is_cuda and rows_RD.dtype == torch.bfloat16 and aligned


def grouped_experts(rows_RD: Tensor, weight_R: Tensor, counts_E: Tensor, w13_EFD: Tensor, w2_EDF: Tensor) -> Tensor:
    """Expert outputs [R, D] by two grouped matmuls. The offsets end at R, so no row is left uninitialised.

    An expert without rows gets a weight gradient of zeros on Hopper. On Blackwell the kernel returns something else
    (pytorch issue 172439, open in 2026-11): mask it before training there.
    """
    ends_E = counts_E.cumsum(0).to(torch.int32)
    return cast(Tensor, _Grouped.apply(rows_RD, weight_R, ends_E, w13_EFD, w2_EDF))  # type: ignore[no-untyped-call]


class _Grouped(torch.autograd.Function):
    """Experts by grouped matmuls. The activation is not saved: the backward pass recomputes it in one kernel."""

    @staticmethod
    def forward(ctx: Any, rows_RD: Tensor, weight_R: Tensor, ends_E: Tensor, w13_EFD: Tensor, w2_EDF: Tensor) -> Tensor:
        h_RX = torch._grouped_mm(rows_RD, w13_EFD.transpose(-2, -1), offs=ends_E)
        act_RF = _gated(h_RX, weight_R)
        ctx.save_for_backward(rows_RD, weight_R, ends_E, w13_EFD, w2_EDF, h_RX)
        return torch._grouped_mm(act_RF, w2_EDF.transpose(-2, -1), offs=ends_E)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows_RD, weight_R, ends_E, w13_EFD, w2_EDF, h_RX = ctx.saved_tensors
        trained = ctx.needs_input_grad[3]  # false where only adapters are trained
        grad_RD = grads[0].contiguous()
        grad_act_RF = torch._grouped_mm(grad_RD, w2_EDF, offs=ends_E)
        act_RF, grad_h_RX, grad_weight_R = _gated_backward(h_RX, weight_R, grad_act_RF)
        grad_w2_EDF = torch._grouped_mm(grad_RD.t(), act_RF, offs=ends_E) if trained else None
        grad_rows_RD = torch._grouped_mm(grad_h_RX, w13_EFD, offs=ends_E)
        grad_w13_EFD = torch._grouped_mm(grad_h_RX.t(), rows_RD, offs=ends_E) if trained else None
        return grad_rows_RD, grad_weight_R.to(weight_R.dtype), None, grad_w13_EFD, grad_w2_EDF


def _gated(h_RX: Tensor, weight_R: Tensor) -> Tensor:
    """silu(gate) * up * weight [R, F] of rows that hold gate, then up; in fp32, rounded once."""
    if h_RX.is_cuda:
        from model.triton_experts import swiglu_forward

        return swiglu_forward(h_RX, weight_R)
    gate_RF, up_RF = h_RX.float().chunk(2, dim=-1)
    return (F.silu(gate_RF) * up_RF * weight_R[:, None]).to(h_RX.dtype)


def _gated_backward(h_RX: Tensor, weight_R: Tensor, grad_RF: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Result of `_gated` recomputed [R, F], and its gradients for h [R, 2 F] and weight [R] (fp32)."""
    if h_RX.is_cuda:
        from model.triton_experts import swiglu_backward

        return swiglu_backward(h_RX, weight_R, grad_RF)
    gate_RF, up_RF = h_RX.float().chunk(2, dim=-1)
    sigmoid_RF, grad = gate_RF.sigmoid(), grad_RF.float()
    silu_RF, weighted_RF = gate_RF * sigmoid_RF, grad * weight_R[:, None]
    grad_gate_RF = weighted_RF * up_RF * sigmoid_RF * (1.0 + gate_RF * (1.0 - sigmoid_RF))
    grad_h_RX = torch.cat([grad_gate_RF, weighted_RF * silu_RF], dim=-1).to(h_RX.dtype)
    act_RF = (silu_RF * up_RF * weight_R[:, None]).to(h_RX.dtype)
    return act_RF, grad_h_RX, (grad * silu_RF * up_RF).sum(dim=-1)


def looped_experts(rows_RD: Tensor, weight_R: Tensor, counts_E: Tensor, w13_EFD: Tensor, w2_EDF: Tensor) -> Tensor:
    """Expert outputs [R, D], one expert after the other; one without rows costs nothing, its gradient is zero."""
    counts = counts_E.tolist()
    weight_R = weight_R.to(rows_RD.dtype)
    outputs = []
    by_expert = zip(
        torch.split(rows_RD, counts), torch.split(weight_R, counts), w13_EFD.unbind(), w2_EDF.unbind(), strict=True
    )
    for x_RD, scale_R, w13_FD, w2_DF in by_expert:
        if x_RD.shape[0]:
            gate_RF, up_RF = F.linear(x_RD, w13_FD).chunk(2, dim=-1)
            outputs.append(F.linear(F.silu(gate_RF) * up_RF * scale_R[:, None], w2_DF))
    return torch.cat(outputs)
