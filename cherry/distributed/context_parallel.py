"""Context parallelism: the positions of each sequence sharded over ranks, by all-gather of the MLA latents.

With MLA a token's keys and values are kv_lora_rank + qk_rope_head_dim numbers, so every rank all-gathers the latents of
the whole sequence and attends with its own queries: exact, one all-gather a layer forward and one reduce-scatter
backward. A sequence is cut into 2 P chunks for P ranks; rank p takes chunks p and 2 P - 1 - p (head and tail), so that
causal attention costs every rank the same. All-reduced expert counts keep the balance loss that of whole sequences.

Shapes: B batch, T position of this rank, S position of the whole sequence, C chunk, E expert, X width of latents.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from model.attention import Attention, Latents
from model.moe import MoE

# torch 2.13 renamed both, and warns of the old names.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class ContextParallel:
    """One rank's positions of every sequence, and the context parallel (CP) group's collectives over them.

    Args:
        group: its ranks hold the other positions of the same sequences, and call every collective in the same order.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self._rank, self._ranks = dist.get_rank(group), dist.get_world_size(group)

    def positions(self, length: int, device: torch.device) -> Tensor:
        """Positions [T] of this rank in a sequence of `length`."""
        return head_tail_positions(self._rank, self._ranks, length, device)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def gather_latents(self, latents: Latents) -> tuple[Latents, tuple[int, int]]:
        """Latents of the whole sequence [B, S, ...] in its order, and the number of them that each half of T sees.

        A query sees all keys up to its own position; the two ends are those of the last query of each half.
        """
        local_BTX = torch.cat(latents, dim=-1)
        half, length = local_BTX.shape[1] // 2, local_BTX.shape[1] * self._ranks
        gathered = _AllGather.apply(local_BTX, self._group)  # type: ignore[no-untyped-call]
        ranks_PBTX = gathered.unflatten(0, (self._ranks, -1))
        order = [head_tail_positions(rank, self._ranks, length, local_BTX.device) for rank in range(self._ranks)]
        whole_BSX = ranks_PBTX.transpose(0, 1).flatten(1, 2)[:, torch.cat(order).argsort()]
        ends = (self._rank + 1) * half, (2 * self._ranks - self._rank) * half
        return Latents(*whole_BSX.split([latent.shape[-1] for latent in latents], dim=-1)), ends

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def reduce_counts(self, counts_BE: Tensor, length: int) -> tuple[Tensor, int]:
        """Expert counts [B, E] over whole sequences, and S, from the counts over this rank's T = `length` positions."""
        whole_BE = counts_BE.clone()
        dist.all_reduce(whole_BE, group=self._group)
        return whole_BE, length * self._ranks


def head_tail_positions(rank: int, ranks: int, length: int, device: torch.device) -> Tensor:
    """Positions [T] of rank `rank` in a sequence of `length`, ascending: one head chunk and one tail chunk.

    Raises:
        ValueError: the sequence does not divide into 2 P chunks.
    """
    chunks = 2 * ranks
    if length % chunks:
        rule = f"context parallelism over {ranks} ranks needs a multiple of {chunks}"
        raise ValueError(f"sequence length: {rule}, got {length}; change the length or the context parallel degree")
    positions_CT = torch.arange(length, device=device).view(chunks, -1)
    return torch.cat([positions_CT[rank], positions_CT[chunks - 1 - rank]])


def apply_context_parallel(model: nn.Module, group: dist.ProcessGroup) -> ContextParallel:
    """Shard attention and MoE layers of `model` by position, in place; the caller cuts its batches by `positions`."""
    context = ContextParallel(group)
    for module in model.modules():
        if isinstance(module, Attention):
            module.gather_latents = context.gather_latents
        elif isinstance(module, MoE):
            module.reduce_counts = context.reduce_counts
    return context


class _AllGather(torch.autograd.Function):
    """All-gather of [B, ...] over P ranks to [P B, ...]; every rank's loss uses it, so backward is a reduce-scatter."""

    @staticmethod
    def forward(ctx: Any, local: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        out = local.new_empty(dist.get_world_size(group) * local.shape[0], *local.shape[1:])
        _all_gather(out, local.contiguous(), group=group)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        grad = grads[0]
        out = grad.new_empty(grad.shape[0] // dist.get_world_size(ctx.group), *grad.shape[1:])
        _reduce_scatter(out, grad.contiguous(), group=ctx.group)
        return out, None
