"""Expert parallelism: all-to-all dispatch of routed rows to the ranks that hold their experts, and the combine back.

Every rank of the expert parallel (EP) group takes part in every call, also with nothing to send. No row is dropped or
padded: a rank computes exactly the rows that are routed to its experts. A token is sent once for each of its experts on
another rank, which suits the ranks of one node (several nodes: cherry/distributed/expert_parallel_nodes.py).

Shapes: N token, K top-k slot, R = routed rows of this rank in expert order, Q = rows that this rank receives, S rank of
the EP group, E expert, L = E / S experts of this rank, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from model.experts import Experts, RunExperts, permutation_by_expert, run_permuted


class AllToAll:
    """All-to-all of row blocks in a process group, with gradients."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.ranks, self.rank = dist.get_world_size(group), dist.get_rank(group)
        self.on_bytes_sent: Callable[[int], None] | None = None
        """Called with the bytes of rows that each all-to-all sends to other ranks, forward and backward."""

    def __call__(self, input_splits: list[int], output_splits: list[int], *tensors: Tensor) -> tuple[Tensor, ...]:
        """Rows received, for each tensor [sum(output_splits), ...]; differentiable.

        Args:
            input_splits: rows that go to each rank.
            output_splits: rows that come from each rank.
        """
        received: tuple[Tensor, ...] = _AllToAll.apply(self, input_splits, output_splits, *tensors)  # type: ignore[no-untyped-call]
        return received

    def no_grad(self, tensor: Tensor, input_splits: list[int], output_splits: list[int]) -> Tensor:
        """Rows received of one tensor [sum(output_splits), ...], without a gradient."""
        out = tensor.new_empty(sum(output_splits), *tensor.shape[1:])
        tensor = tensor.contiguous()
        dist.all_to_all_single(out, tensor, output_splits, input_splits, group=self.group)
        if self.on_bytes_sent is not None:
            away = sum(input_splits) - input_splits[self.rank]
            self.on_bytes_sent(away * tensor[:1].nbytes if away else 0)
        return out

    def counts(self, sent_SL: Tensor) -> Tensor:
        """Row counts that every rank sends to this one [S, L], from those that this rank sends [S, L]."""
        received_SL = torch.empty_like(sent_SL)
        dist.all_to_all_single(received_SL, sent_SL.contiguous(), group=self.group)
        return received_SL


class DispatchPlan(NamedTuple):
    """Split sizes of one dispatch, and the permutation that sorts the received rows by expert."""

    input_splits: list[int]
    """Rows that go to each rank."""
    output_splits: list[int]
    """Rows that come from each rank."""
    order_Q: Tensor
    inverse_Q: Tensor
    counts_L: Tensor
    """Received rows of each local expert, int64."""


class AllToAllDispatcher:
    """Dispatch of tokens to the experts of all ranks of a group by all-to-all, and the combine of their outputs.

    Args:
        group: rank s of it holds experts s * L to (s + 1) * L - 1.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.all_to_all = AllToAll(group)

    def count_bytes(self, on_bytes_sent: Callable[[int], None]) -> None:
        """Call `on_bytes_sent` with the bytes that every all-to-all sends to other ranks."""
        self.all_to_all.on_bytes_sent = on_bytes_sent

    def send(self, x_ND: Tensor) -> Tensor:
        """The tokens as they are: which rows go where, the routing tells."""
        return x_ND

    # One graph break: how many rows go where is data.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(
        self, experts: Experts, x_ND: Tensor, weight_NK: Tensor, experts_NK: Tensor, counts_E: Tensor
    ) -> Tensor:
        """Sum over each token's top-k slots of weight * expert(x) [N, D], each row computed on its expert's rank."""
        plan, permutation = self.plan(counts_E), permutation_by_expert(experts_NK, counts_E)
        return run_permuted(partial(self.dispatch_and_combine, plan, experts.run), x_ND, weight_NK, permutation)

    def receive(self, out_ND: Tensor) -> Tensor:
        """The outputs, which are all here."""
        return out_ND

    def dispatch_and_combine(
        self, plan: DispatchPlan, run: RunExperts, rows_RD: Tensor, weight_R: Tensor, _: Tensor
    ) -> Tensor:
        """Expert outputs [R, D] in the order of `rows_RD`: dispatch, `run` on each expert's rank, combine.

        Args:
            run: this rank's experts: rows [Q, D] in expert order, their weights [Q] and the rows of each expert [L].
        """
        rows_QD, weight_Q = self.all_to_all(plan.input_splits, plan.output_splits, rows_RD, weight_R)
        rows_QD = _Reorder.apply(rows_QD, plan.order_Q, plan.inverse_Q)  # type: ignore[no-untyped-call]
        weight_Q = _Reorder.apply(weight_Q, plan.order_Q, plan.inverse_Q)  # type: ignore[no-untyped-call]
        out_QD = run(rows_QD, weight_Q, plan.counts_L)
        out_QD = _Reorder.apply(out_QD, plan.inverse_Q, plan.order_Q)  # type: ignore[no-untyped-call]
        (out_RD,) = self.all_to_all(plan.output_splits, plan.input_splits, out_QD)
        return out_RD

    def plan(self, counts_E: Tensor) -> DispatchPlan:
        """Split sizes and permutation of one dispatch; a collective of all ranks of the group.

        Args:
            counts_E: this rank's rows of each expert, int64.
        """
        sent_SL = counts_E.view(self.all_to_all.ranks, -1)
        received_SL = self.all_to_all.counts(sent_SL)
        # The only device synchronization of a dispatch: both lists in one copy.
        input_splits, output_splits = torch.stack([sent_SL.sum(1), received_SL.sum(1)]).tolist()
        local = sent_SL.shape[1]
        expert_SL = torch.arange(local, device=counts_E.device).repeat(self.all_to_all.ranks)
        expert_Q = expert_SL.repeat_interleave(received_SL.flatten(), output_size=sum(output_splits))
        order_Q = expert_Q.argsort(stable=True)
        places_Q = torch.arange(len(order_Q), device=counts_E.device)
        inverse_Q = torch.empty_like(order_Q).scatter_(0, order_Q, places_Q)
        return DispatchPlan(input_splits, output_splits, order_Q, inverse_Q, received_SL.sum(0))


def own_slots(experts_MK: Tensor, part: int, experts: int) -> tuple[Tensor, Tensor]:
    """Slots [M, K] by their place among the experts of one part, and the rows of each of these [experts].

    Args:
        part: experts part * experts to (part + 1) * experts - 1; `experts` stands for a slot of another part.
    """
    own_MK = experts_MK - part * experts
    own_MK = torch.where((own_MK >= 0) & (own_MK < experts), own_MK, experts)
    # Adding into so few counters would be slow on a GPU.
    places_E = torch.arange(experts, device=own_MK.device)
    return own_MK, (own_MK.view(-1, 1) == places_E).sum(0)


class _Reorder(torch.autograd.Function):
    """Rows in another order. The gradient is a gather by the inverse: no atomic adds, so deterministic.

    Apart from `model.experts.permute`, whose gradient sums K rows of a token: here each row has exactly one place, and
    a sum would be a pass more over memory.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return rows.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return grads[0].index_select(0, inverse), None, None


class _AllToAll(torch.autograd.Function):
    """Rows of several tensors from other ranks. One function for all tensors keeps their order equal on every rank."""

    @staticmethod
    def forward(
        ctx: Any, all_to_all: AllToAll, input_splits: list[int], output_splits: list[int], *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.all_to_all, ctx.input_splits, ctx.output_splits = all_to_all, input_splits, output_splits
        return tuple(all_to_all.no_grad(tensor, input_splits, output_splits) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        back = (ctx.all_to_all.no_grad(grad, ctx.output_splits, ctx.input_splits) for grad in grads)
        return None, None, None, *back
