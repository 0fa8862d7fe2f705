"""One rank of an expert parallel check: dispatch and combine against all experts on this rank.

    python expert_parallel_rows.py STORE RANK RANKS RANKS_A_NODE|gather

A failed assertion is the result.
"""

import sys
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.checkpoint import checkpoint

from cherry.distributed.expert_gather import GatherDispatcher
from cherry.distributed.expert_parallel import AllToAllDispatcher
from cherry.distributed.expert_parallel_nodes import HierarchicalDispatcher
from model.experts import Experts, TokenDispatcher

TOKENS, TOP_K, WIDTH, EXPERTS_A_RANK = 24, 2, 16, 2


def chosen(case: str, rank: int, experts: int) -> torch.Tensor:
    """The experts [N, K] of each token of a rank."""
    generator = torch.Generator().manual_seed(rank)
    any_NK = torch.rand(TOKENS, experts, generator=generator).topk(TOP_K).indices
    if case == "any":
        return any_NK
    if case == "the last rank's alone":  # all others receive nothing, and every token meets two experts of one rank
        return torch.tensor([experts - 1, experts - 2]).expand(TOKENS, TOP_K)
    if case == "one busy, one without any":
        return torch.where(any_NK == 0, 0, torch.where(any_NK % 3 == 1, 2, any_NK))
    assert case == "one rank has few tokens"
    return any_NK[: 1 if rank == 0 else TOKENS]


class OverGloo:
    """Exchange of equal parts by gloo, one at a time; what came is overwritten by the next, as in memory that stays."""

    def __init__(self) -> None:
        self.ranks, self.rank = dist.get_world_size(), dist.get_rank()
        self.on_bytes_sent: Callable[[int], None] = lambda _: None
        self._box, self._work = torch.empty(0), None

    def start(self, parts: torch.Tensor) -> None:
        assert self._work is None
        if self._box.numel() < parts.numel():
            self._box = torch.empty(parts.numel())
        received = self._box[: parts.numel()].fill_(torch.nan)
        self._work = dist.all_to_all_single(received, parts.contiguous().flatten(), async_op=True)
        self.on_bytes_sent((self.ranks - 1) * parts[0].nbytes)

    def finish(self) -> None:
        self._work.wait()
        self._work = None

    def box(self, shape: torch.Size) -> torch.Tensor:
        return self._box[: shape.numel()].view(shape)


def dispatcher_over(ranks: int, on_node: int | None) -> TokenDispatcher:
    if on_node is None:
        return GatherDispatcher(OverGloo(), OverGloo())
    if on_node == ranks:
        return AllToAllDispatcher(dist.group.WORLD)
    grid = init_device_mesh("cpu", (ranks // on_node, on_node), mesh_dim_names=("internode", "intranode"))
    return HierarchicalDispatcher(grid.get_group("internode"), grid.get_group("intranode"))


def bytes_away(case: str, rank: int, ranks: int, on_node: int | None) -> int:
    """Bytes that this rank sends to others: tokens between nodes, then rows between ranks of its node, both ways."""
    if on_node is None:  # tokens and sums, and the gradients of both; what the router says, and its gradient
        return 4 * (ranks - 1) * TOKENS * (4 * WIDTH + 2 * 2 * TOP_K)
    homes = [chosen(case, other, ranks * EXPERTS_A_RANK) // EXPERTS_A_RANK for other in range(ranks)]
    node, place = rank // on_node, rank % on_node
    crossing = sum(len({*nodes} - {node}) for nodes in (homes[rank] // on_node).tolist())
    rows = 0
    for other, home_NK in enumerate(homes):
        here_NK = home_NK // on_node == node
        if other // on_node != node and other % on_node == place:
            crossing += int(here_NK.any(dim=1).sum())
        if other % on_node == place:
            rows += int((here_NK & (home_NK != rank)).sum())
        else:
            rows += int((home_NK == rank).sum())
    # A token or row one way with its weights, its result back, and the gradients of both.
    return 4 * (crossing * (2 * WIDTH + 2 * TOP_K) + rows * (2 * WIDTH + 1))


def run(module: Experts, x_ND: torch.Tensor, weight_NK: torch.Tensor, *routed: torch.Tensor) -> torch.Tensor:
    """As a layer does, with work of its own that uses saved tensors while the outputs are on their way."""
    out = module(module.send(x_ND), weight_NK, *routed)
    beside = x_ND.sin()
    return module.receive(out) + beside.square()


def main(store: str, rank: int, ranks: int, on_node: int | None) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, ranks), rank=rank, world_size=ranks)
    experts = ranks * EXPERTS_A_RANK
    torch.manual_seed(0)
    whole, own = Experts(experts, WIDTH, 8), Experts(experts, WIDTH, 8)
    mine = slice(rank * EXPERTS_A_RANK, (rank + 1) * EXPERTS_A_RANK)
    for name, parameter in whole.named_parameters():
        nn.init.normal_(parameter, std=0.3)
        setattr(own, name, nn.Parameter(parameter.detach()[mine].clone()))
    own.dispatcher = dispatcher_over(ranks, on_node)
    sent: list[int] = []
    own.dispatcher.count_bytes(sent.append)
    ragged = [] if on_node is None else ["one rank has few tokens"]
    for case in ("any", "the last rank's alone", "one busy, one without any", *ragged):
        experts_NK = chosen(case, rank, experts)
        generator = torch.Generator().manual_seed(100 + rank)
        x_ND = torch.randn(len(experts_NK), WIDTH, generator=generator)
        weight_NK = torch.rand(experts_NK.shape, generator=generator)
        counts_E = experts_NK.flatten().bincount(minlength=experts)
        found = {}
        for name, module, recompute in (("whole", whole, False), ("own", own, False), ("again", own, True)):
            module.zero_grad()
            sent.clear()
            inputs = x_ND.clone().requires_grad_(), weight_NK.clone().requires_grad_()
            arguments = module, *inputs, experts_NK, counts_E
            out_ND = checkpoint(run, *arguments, use_reentrant=False) if recompute else run(*arguments)
            (out_ND.square().sum() + out_ND.sum()).backward()
            if name == "own":
                assert sum(sent) == bytes_away(case, rank, ranks, on_node), case
            found[name] = [out_ND.detach(), *(given.grad for given in inputs), module.w13_EFD.grad, module.w2_EDF.grad]
        for gradient in found["whole"][3:]:
            dist.all_reduce(gradient)  # under expert parallelism an expert gets the rows of all ranks
        found["whole"][3:] = [gradient[mine] for gradient in found["whole"][3:]]
        for wanted, got, recomputed in zip(found["whole"], found["own"], found["again"], strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5, msg=lambda text, case=case: f"{case}: {text}")
            assert torch.equal(got, recomputed), case
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:4]), None if sys.argv[4] == "gather" else int(sys.argv[4]))
