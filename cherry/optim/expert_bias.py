"""Auxiliary-loss-free load balancing: the experts' selection bias moves once an optimizer step (arXiv 2412.19437,
2.1.2).

Shapes: L MoE layers, E experts.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from model.moe import MoE


def expert_counts(layers: list[MoE]) -> Tensor:
    """Tokens of this rank that chose each expert since the last `update_expert_bias`, fp32 [L, E]."""
    return torch.stack([layer.tokens_per_expert_E for layer in layers]) if layers else torch.zeros(0, 0)


@torch.no_grad()
def update_expert_bias(layers: list[MoE], rate: float, counts_LE: Tensor | None = None) -> Tensor:
    """Expert counts of all ranks [L, E], after moving each layer's selection bias towards balance.

    b += rate * sign(mean(c) - c), with c the tokens that chose each expert over all micro-batches and ranks since
    the last call (DeepSeek-V3, arXiv 2412.19437, section 2.1.2). The counts are cleared.

    Args:
        counts_LE: `expert_counts` summed over the ranks; `None` sums them here.
    """
    if counts_LE is None:
        counts_LE = expert_counts(layers)
        if layers and dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(counts_LE)
    if layers:
        moves_LE = rate * torch.sign(counts_LE.mean(dim=1, keepdim=True) - counts_LE)
        for layer, move_E in zip(layers, moves_LE, strict=True):
            if layer.e_score_correction_bias_E is not None:
                layer.e_score_correction_bias_E += move_E
        torch._foreach_zero_([layer.tokens_per_expert_E for layer in layers])
    return counts_LE
