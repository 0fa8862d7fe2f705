"""Owns the optimizer step: AdamW's groups, the learning rate's schedule, clipping, and the experts' selection bias.

It knows nothing of data or of where parameters live.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from cherry.adamw import AdamW
from cherry.config import TrainConfig
from model.moe import MoE

_STATE_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Added to the norm before dividing, as torch.nn.utils.clip_grad_norm_ does.
_CLIP_EPS = 1e-6


def build_optimizer(model: nn.Module, config: TrainConfig) -> AdamW:
    """AdamW over what is trained; weight decay on matrices only, as is usual for norms and biases."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]  # adapters are matrices only
    betas = (config.beta1, config.beta2)
    return AdamW(groups, lr=config.learning_rate, betas=betas, state_dtype=_STATE_DTYPES[config.optimizer_state_dtype])


def learning_rate(config: TrainConfig, step: int) -> float:
    """The rate of optimizer step `step` (0-based): linear warm-up, then the schedule down to its minimum ratio."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.learning_rate
    progress = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    left = 0.5 * (1 + math.cos(math.pi * progress)) if config.schedule == "cosine" else 1 - progress
    low = config.min_learning_rate_ratio
    return config.learning_rate * (low + (1 - low) * left)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every group the same rate."""
    for group in optimizer.param_groups:
        group["lr"] = rate


@torch.no_grad()
def gradient_norm(model: nn.Module) -> Tensor:
    """The total norm of the gradients, 0-dim fp32, over all ranks' shards; nothing is scaled.

    One norm over parameters of several meshes, which `torch.nn.utils.get_total_norm` refuses: each rank's own squares
    are summed over the axes that a gradient is sharded over, copies are counted once.
    """
    spread: dict[tuple[DeviceMesh, tuple[int, ...]] | None, list[Tensor]] = {}
    for parameter in model.parameters():
        gradient = parameter.grad
        if isinstance(gradient, DTensor):
            axes = tuple(axis for axis, place in enumerate(gradient.placements) if not place.is_replicate())
            spread.setdefault((gradient.device_mesh, axes), []).append(gradient.to_local())
        elif gradient is not None:
            spread.setdefault(None, []).append(gradient)
    if not spread:
        return torch.zeros(())
    return torch.stack([_sum_of_squares(local, where) for where, local in spread.items()]).sum().sqrt()


def _sum_of_squares(local: list[Tensor], where: tuple[DeviceMesh, tuple[int, ...]] | None) -> Tensor:
    """Of these tensors and of their other shards, 0-dim fp32."""
    total = square_sum(local)
    if where is None:
        return total
    mesh, axes = where
    total = total.to(mesh.device_type)  # gradients that are offloaded are on the CPU
    for axis in axes:
        if mesh.size(axis) > 1:
            dist.all_reduce(total, group=mesh.get_group(axis))
    return total


def square_sum(gradients: Sequence[Tensor]) -> Tensor:
    """The sum of the squares of all elements, 0-dim fp32."""
    if gradients[0].is_cuda:
        from cherry import triton_adamw

        return triton_adamw.square_sum(gradients)
    return torch.stack(torch._foreach_norm(list(gradients), dtype=torch.float32)).square().sum()


def clip_coefficient(norm: Tensor, max_norm: float) -> Tensor:
    """What brings gradients of total norm `norm` down to at most `max_norm`, at most 1, 0-dim on norm's device.

    The optimizer multiplies on its own pass over the gradients: scaling them beforehand reads and writes all again.
    """
    return (max_norm / (norm + _CLIP_EPS)).clamp(max=1.0)


def expert_counts(layers: list[MoE]) -> Tensor:
    """Tokens of this rank that chose each expert since the last `update_expert_bias`, fp32 [L, E]."""
    return torch.stack([layer.tokens_per_expert_E for layer in layers]) if layers else torch.zeros(0, 0)


@torch.no_grad()
def update_expert_bias(layers: list[MoE], rate: float, counts_LE: Tensor | None = None) -> Tensor:
    """Move each layer's selection bias towards balance, once an optimizer step; the counts [L, E], all ranks'.

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
