"""Owns how a model is spread over the ranks: the mesh, the order of sharding, and the first values of each shard.

It knows nothing of losses or steps. It is the only file that calls `fully_shard`; nothing of the full model ever sits
on one rank: meta device, sharding, `to_empty`, then each rank fills its own part (from weights: cherry/loading.py).
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from cherry.config import ParallelConfig
from cherry.loading import local_part
from model.transformer import Block, DeepseekV3, initial_values


def build_mesh(config: ParallelConfig, device: torch.device) -> DeviceMesh | None:
    """The (replicate, shard) mesh, or a plain shard mesh; `None` for one CPU rank, where sharding only costs time."""
    ranks = dist.get_world_size()
    if ranks == 1 and device.type == "cpu":
        return None
    shard = config.shard or ranks // config.replicate
    if config.replicate == 1:
        return init_device_mesh(device.type, (shard,), mesh_dim_names=("shard",))
    return init_device_mesh(device.type, (config.replicate, shard), mesh_dim_names=("replicate", "shard"))


def shard_model(root: nn.Module, mesh: DeviceMesh | None, precision: str) -> None:
    """Shard every block of `root` by itself, then what is left, in place.

    Parameters, gradients' reduction and optimizer states are fp32; with bf16 each block is gathered and computed
    in bf16. Gradients are summed over ranks: the loss is divided by the count of tokens of all of them.
    """
    if mesh is None:
        return
    param_dtype = torch.bfloat16 if precision == "bf16" else None
    policy = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=torch.float32)
    for module in root.modules():
        if isinstance(module, Block):
            fully_shard(module, mesh=mesh, mp_policy=policy)
    fully_shard(root, mesh=mesh, mp_policy=policy)
    for module in root.modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)  # gloo has no premultiplied sum
            module.set_gradient_divide_factor(1.0)


@torch.no_grad()
def initialize(model: DeepseekV3, seed: int) -> None:
    """Random weights, each parameter's rows drawn by name and position: the same at every world size."""
    std = model.config.initializer_range
    for name, parameter in model.named_parameters():
        local, box = local_part(parameter)
        if local.numel():
            values = initial_values(name, parameter.shape, seed=seed, std=std, rows=box[0])
            local.copy_(values[(slice(None), *(slice(*range_) for range_ in box[1:]))])
    for buffer in model.buffers():
        buffer.zero_()
