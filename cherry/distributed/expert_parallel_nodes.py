"""Owns the way of tokens to experts on other nodes: once to each node that has any of a token's, and from there on.

It knows nothing of routing or of the experts' arithmetic. A token goes to the rank of the other node that has its own
rank's place there; that rank copies it to the experts of its node, adds up what becomes of it, and sends one row back.
With V3's router a token's 8 experts lie on at most topk_group = 4 nodes (DeepSeek-V3, arXiv 2412.19437, sections 2.1.2
and 3.2.2), so the slow links carry half of the rows or less.

Shapes: N token of this rank, K choice, B node, P = tokens that this rank sends, once for each node, M = tokens that it
receives, E experts of a node, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from cherry.distributed.expert_parallel import Exchange, ExpertDispatch
from model.experts import Dispatch, RunExperts, gather_rows, plan_dispatch, spread_rows, through_experts


class NodeDispatch:
    """Runs tokens through the experts of all ranks of several nodes.

    Args:
        across: the ranks with this one's place in every node, in the nodes' order.
        inside: the ranks of this node. Rank s of node b holds the experts from (b * len(inside) + s) * L on.
    """

    def __init__(self, across: dist.ProcessGroup, inside: dist.ProcessGroup) -> None:
        self.exchange, self.inside = Exchange(across), ExpertDispatch(inside)

    def count_bytes(self, count: Callable[[int], None]) -> None:
        """Tell `count` of the bytes that every exchange sends to other ranks."""
        self.exchange.count = count
        self.inside.count_bytes(count)

    # One graph break: how many tokens go where is data.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, run: RunExperts, x_ND: Tensor, weight_NK: Tensor, dispatch: Dispatch) -> Tensor:
        """`through_experts`, each row on the rank of its expert.

        Args:
            run: this rank's experts.
        """
        nodes = self.exchange.ranks
        each = dispatch.counts_E.shape[0] // nodes
        sent, received, there = self._plan(dispatch.experts_NK, nodes, each)
        # Expert numbers ride along with the weights: fp32 holds them exactly.
        told_NX = torch.cat([weight_NK.float(), dispatch.experts_NK.float()], dim=1)
        x_MD, told_MX = self.exchange(sent, received, spread_rows(x_ND, there), spread_rows(told_NX, there))
        weight_MK, experts_MK = told_MX.chunk(2, dim=1)
        (out_PD,) = self.exchange(received, sent, self._here(run, x_MD, weight_MK, experts_MK.detach().long(), each))
        return gather_rows(out_PD, there)

    def _plan(self, experts_NK: Tensor, nodes: int, each: int) -> tuple[list[int], list[int], Dispatch]:
        """Tokens to and from each node, and each token's places among those that leave."""
        goes_NB = torch.zeros(len(experts_NK), nodes, dtype=torch.bool, device=experts_NK.device)
        goes_NB.scatter_(1, experts_NK // each, value=True)
        sent_B = goes_NB.sum(0)
        sent, received = torch.stack([sent_B, self.exchange.counts(sent_B)]).tolist()
        node_NB = torch.where(goes_NB, torch.arange(nodes, device=goes_NB.device), nodes)
        return sent, received, plan_dispatch(node_NB, sent_B, sum(sent))

    def _here(self, run: RunExperts, x_MD: Tensor, weight_MK: Tensor, experts_MK: Tensor, each: int) -> Tensor:
        """What this node's experts make of tokens that came, weighted and added up [M, D]."""
        own_MK = experts_MK - self.exchange.rank * each
        own_MK = torch.where((own_MK >= 0) & (own_MK < each), own_MK, each)
        counts_E = own_MK.new_zeros(each + 1).scatter_add_(0, own_MK.flatten(), torch.ones_like(own_MK.flatten()))
        plan = self.inside.plan(counts_E[:each])
        places = plan_dispatch(own_MK, counts_E[:each], sum(plan.sent))
        return through_experts(partial(self.inside.rows, plan, run), x_MD, weight_MK, places)
