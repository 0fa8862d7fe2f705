"""Owns how the positions of a sequence are shared out among ranks, and what they tell each other: latents and counts.

It knows nothing of attention's arithmetic. With MLA a token leaves kv_lora_rank + qk_rope_head_dim numbers for later
ones, so every rank gathers those of the whole sequence and attends with its own queries: exact, one collective a layer
in each direction. A sequence is cut into 2 P parts for P ranks; rank p takes parts p and 2 P - 1 - p, so that causal
attention costs every rank the same.

Shapes: B batch, T position of this rank, S position of the whole sequence, C latent width, R rotary width, E expert.
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


class ContextSplit:
    """One rank's share of every sequence. Its collectives are called by all ranks of `group` in the same order."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self._rank, self._ranks = dist.get_rank(group), dist.get_world_size(group)

    def positions(self, length: int, device: torch.device) -> Tensor:
        """The positions [T] of this rank in a sequence of `length`."""
        return positions_of(self._rank, self._ranks, length, device)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def whole_latents(self, latents: Latents) -> tuple[Latents, tuple[int, int]]:
        """The latents of the whole sequence in its order, and how many of them each half of this rank's queries sees.

        A query sees all keys up to its own position; the ends are those of the last query of each half.
        """
        local_BTX = torch.cat(latents, dim=-1)
        half, length = local_BTX.shape[1] // 2, local_BTX.shape[1] * self._ranks
        gathered = _Gather.apply(local_BTX, self._group)  # type: ignore[no-untyped-call]
        ranks_PBTX = gathered.unflatten(0, (self._ranks, -1))
        order = [positions_of(rank, self._ranks, length, local_BTX.device) for rank in range(self._ranks)]
        whole_BSX = ranks_PBTX.transpose(0, 1).flatten(1, 2)[:, torch.cat(order).argsort()]
        ends = (self._rank + 1) * half, (2 * self._ranks - self._rank) * half
        return Latents(*whole_BSX.split([part.shape[-1] for part in latents], dim=-1)), ends

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def whole_counts(self, counts_BE: Tensor, length: int) -> tuple[Tensor, int]:
        """Counts over the whole sequences, from those over this rank's `length` positions; and the whole length."""
        whole_BE = counts_BE.clone()
        dist.all_reduce(whole_BE, group=self._group)
        return whole_BE, length * self._ranks


def positions_of(rank: int, ranks: int, length: int, device: torch.device) -> Tensor:
    """The positions [T] of rank `rank` in a sequence of `length`, ascending: an early part and a late one.

    Raises:
        ValueError: the sequence does not divide into 2 P parts.
    """
    parts = 2 * ranks
    if length % parts:
        raise ValueError(f"a sequence of {length} does not divide into {parts} parts")
    parts_PT = torch.arange(length, device=device).view(parts, -1)
    return torch.cat([parts_PT[rank], parts_PT[parts - 1 - rank]])


def share_positions(model: nn.Module, group: dist.ProcessGroup) -> ContextSplit:
    """Let the layers of `model` work on this rank's positions; the caller takes them out of its batches."""
    split = ContextSplit(group)
    for module in model.modules():
        if isinstance(module, Attention):
            module.whole_latents = split.whole_latents
        elif isinstance(module, MoE):
            module.whole_counts = split.whole_counts
    return split


class _Gather(torch.autograd.Function):
    """[B, ...] of each of P ranks -> [P B, ...] on all. Every rank's loss depends on it: gradients are summed."""

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
