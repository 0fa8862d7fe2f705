"""Hierarchical expert parallelism: dispatch over several nodes, at most one copy of a token to each node.

A token is sent to the rank of the other node that has the same index within its node (internode all-to-all). That rank
dispatches it to the experts of its node (intranode all-to-all), sums their outputs, and sends one row back. With V3's
node-limited routing a token's 8 experts are on at most topk_group = 4 nodes (DeepSeek-V3, arXiv 2412.19437, sections
2.1.2 and 3.2.2), so the slow links carry half of the rows or less.

Shapes: N token of this rank, K top-k slot, B node, P = tokens that this rank sends, once for each node, M = tokens that
it receives, E experts of a node, D hidden, X = 2 K.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from cherry.distributed.expert_parallel import AllToAll, AllToAllDispatcher, own_slots
from model.experts import Experts, Permutation, RunExperts, permutation_by_expert, permute, run_permuted, unpermute


class HierarchicalDispatcher:
    """Dispatch of tokens to the experts of all ranks of several nodes, and the combine of their outputs.

    Args:
        internode: the ranks with this rank's index within their node, one of every node, in node order.
        intranode: the ranks of this node. Rank s of node b holds the experts from (b * len(intranode) + s) * L on.
    """

    def __init__(self, internode: dist.ProcessGroup, intranode: dist.ProcessGroup) -> None:
        self.internode, self.intranode = AllToAll(internode), AllToAllDispatcher(intranode)

    def count_bytes(self, on_bytes_sent: Callable[[int], None]) -> None:
        """Call `on_bytes_sent` with the bytes that every all-to-all sends to other ranks."""
        self.internode.on_bytes_sent = on_bytes_sent
        self.intranode.count_bytes(on_bytes_sent)

    def send(self, x_ND: Tensor) -> Tensor:
        """The tokens as they are: which of them go where, the routing tells."""
        return x_ND

    def receive(self, out_ND: Tensor) -> Tensor:
        """The outputs, which are all here."""
        return out_ND

    # One graph break: how many tokens go where is data.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(
        self, experts: Experts, x_ND: Tensor, weight_NK: Tensor, experts_NK: Tensor, counts_E: Tensor
    ) -> Tensor:
        """Sum over each token's top-k slots of weight * expert(x) [N, D], each row computed on its expert's rank."""
        nodes = self.internode.ranks
        node_experts = counts_E.shape[0] // nodes
        input_splits, output_splits, by_node = self._plan_internode(experts_NK, nodes, node_experts)
        # Expert indices are sent with the weights: fp32 holds them exactly.
        routing_NX = torch.cat([weight_NK.float(), experts_NK.float()], dim=1)
        x_MD, routing_MX = self.internode(
            input_splits, output_splits, permute(x_ND, by_node), permute(routing_NX, by_node)
        )
        weight_MK, experts_MK = routing_MX.chunk(2, dim=1)
        out_MD = self._run_intranode(experts.run, x_MD, weight_MK, experts_MK.detach().long(), node_experts)
        (out_PD,) = self.internode(output_splits, input_splits, out_MD)
        return unpermute(out_PD, by_node)

    def _plan_internode(
        self, experts_NK: Tensor, nodes: int, node_experts: int
    ) -> tuple[list[int], list[int], Permutation]:
        """Tokens to each node and from each node, and the permutation of this rank's tokens by node."""
        goes_NB = torch.zeros(len(experts_NK), nodes, dtype=torch.bool, device=experts_NK.device)
        goes_NB.scatter_(1, experts_NK // node_experts, value=True)
        sent_B = goes_NB.sum(0)
        input_splits, output_splits = torch.stack([sent_B, self.internode.counts(sent_B)]).tolist()
        node_NB = torch.where(goes_NB, torch.arange(nodes, device=goes_NB.device), nodes)
        return input_splits, output_splits, permutation_by_expert(node_NB, sent_B, sum(input_splits))

    def _run_intranode(
        self, run: RunExperts, x_MD: Tensor, weight_MK: Tensor, experts_MK: Tensor, node_experts: int
    ) -> Tensor:
        """Outputs of this node's experts for received tokens, weighted and summed over top-k slots [M, D]."""
        own_MK, counts_E = own_slots(experts_MK, self.internode.rank, node_experts)
        plan = self.intranode.plan(counts_E)
        permutation = permutation_by_expert(own_MK, counts_E, sum(plan.input_splits))
        return run_permuted(partial(self.intranode.dispatch_and_combine, plan, run), x_MD, weight_MK, permutation)
