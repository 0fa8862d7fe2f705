"""Owns how routed rows travel to the ranks that hold their experts, and back: all-to-all, in both directions.

It knows nothing of routing or of the experts' arithmetic. Every rank of the group takes part in every call, also with
nothing to send, and no row is dropped or padded: a rank computes as many rows as its experts were chosen for. A token
goes to a rank once for each of its experts there: for ranks of one node (several:
cherry/distributed/expert_parallel_nodes.py).

Shapes: N token, K choice, R = routed rows of this rank in expert order, Q = rows that this rank receives, S rank of the
group, E expert, L = E / S experts of this rank, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from model.experts import Dispatch, RunExperts, through_experts


class Exchange:
    """All-to-all of row blocks in a group, with gradients."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.ranks, self.rank = dist.get_world_size(group), dist.get_rank(group)
        self.count: Callable[[int], None] | None = None
        """Told of the bytes of rows that each exchange sends to other ranks, forward and backward."""

    def __call__(self, sent: list[int], received: list[int], *tensors: Tensor) -> tuple[Tensor, ...]:
        """Row blocks of each tensor: `sent[s]` of them to rank s, `received[s]` from it; differentiable."""
        exchanged: tuple[Tensor, ...] = _AllToAll.apply(self, sent, received, *tensors)  # type: ignore[no-untyped-call]
        return exchanged

    def plain(self, tensor: Tensor, sent: list[int], received: list[int]) -> Tensor:
        """The same of one tensor, without a gradient."""
        out = tensor.new_empty(sum(received), *tensor.shape[1:])
        tensor = tensor.contiguous()
        dist.all_to_all_single(out, tensor, received, sent, group=self.group)
        if self.count is not None:
            away = sum(sent) - sent[self.rank]
            self.count(away * tensor[:1].nbytes if away else 0)
        return out

    def counts(self, sent_SL: Tensor) -> Tensor:
        """Row s of each rank's counts, from every rank."""
        received_SL = torch.empty_like(sent_SL)
        dist.all_to_all_single(received_SL, sent_SL.contiguous(), group=self.group)
        return received_SL


class RowPlan(NamedTuple):
    """How many rows go where, and how those that came are sorted by expert."""

    sent: list[int]
    received: list[int]
    order_Q: Tensor
    inverse_Q: Tensor
    counts_L: Tensor


class ExpertDispatch:
    """Runs tokens through the experts of all ranks of a group.

    Args:
        group: rank s of it holds experts s * L to (s + 1) * L - 1.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.exchange = Exchange(group)

    def count_bytes(self, count: Callable[[int], None]) -> None:
        """Tell `count` of the bytes that every exchange sends to other ranks."""
        self.exchange.count = count

    # One graph break: how many rows go where is data.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, run: RunExperts, x_ND: Tensor, weight_NK: Tensor, dispatch: Dispatch) -> Tensor:
        """`through_experts`, each row on the rank of its expert.

        Args:
            run: this rank's experts: rows [Q, D] in expert order, their weights [Q] and the rows of each expert [L].
        """
        plan = self.plan(dispatch.counts_E)
        return through_experts(partial(self.rows, plan, run), x_ND, weight_NK, dispatch)

    def rows(self, plan: RowPlan, run: RunExperts, rows_RD: Tensor, weight_R: Tensor, _: Tensor) -> Tensor:
        """`run` for every row on the rank of its expert; the results [R, D] in the order of `rows_RD`."""
        rows_QD, weight_Q = self.exchange(plan.sent, plan.received, rows_RD, weight_R)
        rows_QD = _Permute.apply(rows_QD, plan.order_Q, plan.inverse_Q)  # type: ignore[no-untyped-call]
        weight_Q = _Permute.apply(weight_Q, plan.order_Q, plan.inverse_Q)  # type: ignore[no-untyped-call]
        out_QD = _run_some(run, rows_QD, weight_Q, plan.counts_L)
        out_QD = _Permute.apply(out_QD, plan.inverse_Q, plan.order_Q)  # type: ignore[no-untyped-call]
        (out_RD,) = self.exchange(plan.received, plan.sent, out_QD)
        return out_RD

    def plan(self, counts_E: Tensor) -> RowPlan:
        """Where rows go; all ranks together.

        Args:
            counts_E: rows of each expert, int64.
        """
        sent_SL = counts_E.view(self.exchange.ranks, -1)
        received_SL = self.exchange.counts(sent_SL)
        # The one wait for the device: both lists in one copy.
        sent, received = torch.stack([sent_SL.sum(1), received_SL.sum(1)]).tolist()
        local = sent_SL.shape[1]
        expert_SL = torch.arange(local, device=counts_E.device).repeat(self.exchange.ranks)
        expert_Q = expert_SL.repeat_interleave(received_SL.flatten(), output_size=sum(received))
        order_Q = expert_Q.argsort(stable=True)
        places_Q = torch.arange(len(order_Q), device=counts_E.device)
        inverse_Q = torch.empty_like(order_Q).scatter_(0, order_Q, places_Q)
        return RowPlan(sent, received, order_Q, inverse_Q, received_SL.sum(0))


def _run_some(run: RunExperts, rows_QD: Tensor, weight_Q: Tensor, counts_L: Tensor) -> Tensor:
    """`run`, on a row of zeros where there is none: kernels need one, and every weight a gradient on every rank."""
    if rows_QD.shape[0]:
        return run(rows_QD, weight_Q, counts_L)
    one = torch.zeros_like(counts_L)
    one[0] = 1
    return run(F.pad(rows_QD, (0, 0, 0, 1)), F.pad(weight_Q, (0, 1)), one)[:0]


class _Permute(torch.autograd.Function):
    """Rows in another order. The gradient is a gather by the inverse: no atomic adds, so repeatable."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return rows.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return grads[0].index_select(0, inverse), None, None


class _AllToAll(torch.autograd.Function):
    """Rows of several tensors to other ranks. One function for all of them: their order is the same on every rank."""

    @staticmethod
    def forward(
        ctx: Any, exchange: Exchange, sent: list[int], received: list[int], *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.exchange, ctx.sent, ctx.received = exchange, sent, received
        return tuple(exchange.plain(tensor, sent, received) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        back = (ctx.exchange.plain(grad, ctx.received, ctx.sent) for grad in grads)
        return None, None, None, *back
