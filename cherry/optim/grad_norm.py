"""Gradient norm over sharded parameters and the coefficient that clips to a maximum norm."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

# Added to the norm before dividing, as torch.nn.utils.clip_grad_norm_ does.
_CLIP_EPS = 1e-6


@torch.no_grad()
def gradient_norm(model: nn.Module) -> Tensor:
    """The total norm of the gradients, 0-dim fp32, over all ranks' shards; nothing is scaled."""
    found = [(parameter, parameter.grad) for parameter in model.parameters() if parameter.grad is not None]
    return total_norm([(one, grad.to_local() if isinstance(grad, DTensor) else grad) for one, grad in found])


@torch.no_grad()
def total_norm(gradients: Sequence[tuple[nn.Parameter, Tensor]]) -> Tensor:
    """The norm of several parameters' gradients together, 0-dim fp32, over all ranks' shards.

    One norm over parameters of several meshes, which `torch.nn.utils.get_total_norm` refuses: each rank's own squares
    are summed over the axes that a parameter is sharded over, copies are counted once.

    Args:
        gradients: each parameter with this rank's shard of its gradient.
    """
    spread: dict[tuple[DeviceMesh, tuple[int, ...]] | None, list[Tensor]] = {}
    for parameter, gradient in gradients:
        where = None
        if isinstance(parameter.data, DTensor):
            placements = enumerate(parameter.data.placements)
            axes = tuple(axis for axis, place in placements if not place.is_replicate())
            where = parameter.data.device_mesh, axes
        spread.setdefault(where, []).append(gradient)
    if not spread:
        return torch.zeros(())
    return torch.stack([_sum_of_squares(local, where) for where, local in spread.items()]).sum().sqrt()


def _sum_of_squares(local: list[Tensor], where: tuple[DeviceMesh, tuple[int, ...]] | None) -> Tensor:
    """Sum of squares over local tensors and their shards on other ranks, 0-dim fp32."""
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
        from cherry.optim import triton_adamw

        return triton_adamw.square_sum(gradients)
    return torch.stack(torch._foreach_norm(list(gradients), dtype=torch.float32)).square().sum()


def clip_coefficient(norm: Tensor, max_norm: float) -> Tensor:
    """Factor that scales gradients of total norm `norm` to at most `max_norm`; at most 1, 0-dim on norm's device.

    The optimizer multiplies on its own pass over the gradients: scaling them beforehand reads and writes all again.
    """
    return (max_norm / (norm + _CLIP_EPS)).clamp(max=1.0)
