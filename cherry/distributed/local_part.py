"""Local shard of a DTensor, and the box of the unsharded tensor that it covers."""

from __future__ import annotations

from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from model.weights.safetensors_file import Box, whole_box


def local_part(tensor: Tensor) -> tuple[Tensor, Box]:
    """Local shard of a tensor that is sharded over any axes and dimensions, and its box in the unsharded one."""
    if not isinstance(tensor, DTensor):
        return tensor, whole_box(tensor.shape)
    local = tensor.to_local()
    _, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return local, tuple((first, first + size) for first, size in zip(offset, local.shape, strict=True))
