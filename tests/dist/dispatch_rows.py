"""One rank of a check: rows through experts that are spread over ranks, against all of them on this one.

python dispatch_rows.py STORE RANK RANKS. An assertion that fails is the answer.
"""

import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint

from cherry.dispatch import ExpertDispatch
from model.experts import Experts, plan_dispatch

TOKENS, CHOICES, WIDTH, EXPERTS_A_RANK = 24, 2, 16, 2


def chosen(case: str, rank: int, experts: int) -> torch.Tensor:
    """The experts [N, K] of each token of a rank."""
    generator = torch.Generator().manual_seed(rank)
    any_NK = torch.rand(TOKENS, experts, generator=generator).topk(CHOICES).indices
    if case == "any":
        return any_NK
    if case == "the last rank's alone":  # all others receive nothing, and every token meets two experts of one rank
        return torch.tensor([experts - 1, experts - 2]).expand(TOKENS, CHOICES)
    if case == "one busy, one without any":
        return torch.where(any_NK == 0, 0, torch.where(any_NK % 3 == 1, 2, any_NK))
    assert case == "one rank has few tokens"
    return any_NK[: 1 if rank == 0 else TOKENS]


def main(store: str, rank: int, ranks: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, ranks), rank=rank, world_size=ranks)
    experts = ranks * EXPERTS_A_RANK
    torch.manual_seed(0)
    whole, own = Experts(experts, WIDTH, 8), Experts(experts, WIDTH, 8)
    mine = slice(rank * EXPERTS_A_RANK, (rank + 1) * EXPERTS_A_RANK)
    for name, parameter in whole.named_parameters():
        nn.init.normal_(parameter, std=0.3)
        setattr(own, name, nn.Parameter(parameter.detach()[mine].clone()))
    own.spread = ExpertDispatch(dist.group.WORLD)
    sent: list[int] = []
    own.spread.count = sent.append
    for case in ("any", "the last rank's alone", "one busy, one without any", "one rank has few tokens"):
        experts_NK = chosen(case, rank, experts)
        generator = torch.Generator().manual_seed(100 + rank)
        x_ND = torch.randn(len(experts_NK), WIDTH, generator=generator)
        weight_NK = torch.rand(experts_NK.shape, generator=generator)
        plan = plan_dispatch(experts_NK, experts_NK.flatten().bincount(minlength=experts))
        everywhere_E = plan.counts_E.clone()
        dist.all_reduce(everywhere_E)
        own_rows = int(plan.counts_E[mine].sum())
        away, came = int(plan.counts_E.sum()) - own_rows, int(everywhere_E[mine].sum()) - own_rows
        found = {}
        for name, module, recompute in (("whole", whole, False), ("own", own, False), ("again", own, True)):
            module.zero_grad()
            sent.clear()
            inputs = x_ND.clone().requires_grad_(), weight_NK.clone().requires_grad_()
            out_ND = checkpoint(module, *inputs, plan, use_reentrant=False) if recompute else module(*inputs, plan)
            (out_ND.square().sum() + out_ND.sum()).backward()
            if name == "own":
                # Rows and their weights one way and results the other, then the gradients of both.
                assert sum(sent) == (away + came) * 4 * (2 * WIDTH + 1), case
            found[name] = [out_ND.detach(), *(given.grad for given in inputs), module.w13_EFD.grad, module.w2_EDF.grad]
        for gradient in found["whole"][3:]:
            dist.all_reduce(gradient)  # a spread expert sees the rows of all ranks
        found["whole"][3:] = [gradient[mine] for gradient in found["whole"][3:]]
        for one, two, three in zip(found["whole"], found["own"], found["again"], strict=True):
            torch.testing.assert_close(two, one, rtol=1e-5, atol=1e-5, msg=lambda text, case=case: f"{case}: {text}")
            assert torch.equal(two, three), case
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
