"""Owns how a model is spread over the ranks: the order of sharding, and the first values of each shard.

It knows nothing of losses or steps. It is the only file that calls `fully_shard`; nothing of the full model ever sits
on one rank: meta device, sharding, `to_empty`, then each rank fills its own part (from weights: cherry/loading.py).
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from cherry.distributed.expert_parallel import ExpertDispatch
from cherry.distributed.expert_parallel_nodes import NodeDispatch
from cherry.distributed.local_part import local_part
from cherry.distributed.mesh import Meshes, build_meshes
from cherry.job_config import ParallelConfig
from cherry.parallel_rules import keeps_working_copies, shards_by_width
from model.experts import Experts
from model.moe import MoE
from model.transformer import Block, DeepseekV3, initial_values


def build_mesh(config: ParallelConfig, device: torch.device) -> Meshes | None:
    """The meshes of all ranks; `None` for one CPU rank, where sharding only costs time."""
    if dist.get_world_size() == 1 and device.type == "cpu":
        return None
    return build_meshes(config, device)


def keeps_copies(meshes: Meshes | None, precision: str, parallel: ParallelConfig) -> bool:
    """Whether the half-precision copies of the parameters stay between passes: on a mesh of one
    (cherry/distributed/resident_params.py)."""
    if meshes is None:
        return False
    return keeps_working_copies(meshes.dense.size(), precision, cpu_offload=parallel.cpu_offload)


def shard_model(root: nn.Module, meshes: Meshes | None, precision: str, parallel: ParallelConfig | None = None) -> None:
    """Shard every block of `root` by itself, then what is left, in place.

    Parameters, gradients' reduction and optimizer states are fp32; with bf16 or fp8 each block is gathered and computed
    in bf16. Gradients are summed over ranks: the loss is divided by the count of tokens of all of them.
    """
    if meshes is None:
        return
    parallel = parallel or ParallelConfig()
    policies = _policies(meshes, precision, parallel)
    blocks = [module for module in root.modules() if isinstance(module, Block)]
    for block in blocks:
        if meshes.experts is not None and isinstance(block.mlp, MoE):
            _spread_experts(block.mlp.experts, meshes, policies, reshard=parallel.reshard_after_forward is not False)
        fully_shard(
            block,
            mesh=meshes.dense,
            reshard_after_forward=parallel.reshard_after_forward,
            shard_placement_fn=_placement(block, meshes.dense),
            **policies,
        )
    fully_shard(root, mesh=meshes.dense, **policies)
    for module in root.modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)  # gloo has no premultiplied sum
            module.set_gradient_divide_factor(1.0)
    if meshes.experts is not None:
        _prefetch(root, blocks)


def _policies(meshes: Meshes, precision: str, parallel: ParallelConfig) -> dict[str, Any]:
    param_dtype = torch.bfloat16 if precision != "fp32" else None
    reduce_dtype = None if keeps_copies(meshes, precision, parallel) else torch.float32
    pinned = CPUOffloadPolicy(pin_memory=meshes.dense.device_type == "cuda")
    return {
        "mp_policy": MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=reduce_dtype),
        "offload_policy": pinned if parallel.cpu_offload else OffloadPolicy(),
    }


def _spread_experts(experts: Experts, meshes: Meshes, policies: dict[str, Any], *, reshard: bool) -> None:
    """Deal a layer's experts out over the expert axis, then shard each rank's own over the ranks that are left."""
    assert meshes.experts is not None
    mesh = meshes.experts["expert"]
    for name, parameter in list(experts.named_parameters()):
        own = torch.empty(parameter.shape[0] // mesh.size(), *parameter.shape[1:], device="meta")
        setattr(experts, name, nn.Parameter(DTensor.from_local(own, mesh, [Shard(0)], run_check=False)))
    if meshes.expert_nodes is None:
        experts.spread = ExpertDispatch(mesh.get_group())
    else:
        experts.spread = NodeDispatch(*meshes.expert_nodes)
    shards = meshes.expert_shards
    placement = _placement(experts, shards)
    fully_shard(experts, mesh=shards, reshard_after_forward=reshard, shard_placement_fn=placement, **policies)


def _placement(module: nn.Module, mesh: DeviceMesh) -> Any:
    """Where FSDP2 cuts each parameter: by rows, but experts that do not go round by their next dimension."""
    ranks = mesh.size(-1)
    fused = {parameter for part in module.modules() if isinstance(part, Experts) for parameter in part.parameters()}

    def place(parameter: nn.Parameter) -> Shard | None:
        if parameter not in fused:
            return None
        own_unit = isinstance(parameter, DTensor)
        rows = parameter.to_local().shape[0] if isinstance(parameter, DTensor) else parameter.shape[0]
        return Shard(1) if shards_by_width(rows, parameter.shape[1], ranks, expert_parallel=own_unit) else None

    return place


def _prefetch(root: nn.Module, blocks: list[Block]) -> None:
    """Say which parameters to gather ahead: FSDP2's own guess knows nothing of experts inside blocks.

    While a block computes, the next one's dense part and experts travel, in the backward pass the one before it.
    """

    def parts(block: Block) -> list[FSDPModule]:
        inner = [block.mlp.experts] if isinstance(block.mlp, MoE) else []
        return [part for part in (block, *inner) if isinstance(part, FSDPModule)]

    assert isinstance(root, FSDPModule)
    root.set_modules_to_forward_prefetch(parts(blocks[0]))
    root.set_modules_to_backward_prefetch(parts(blocks[-1]))
    for block, following in pairwise(blocks):
        assert isinstance(block, FSDPModule)
        assert isinstance(following, FSDPModule)
        block.set_modules_to_forward_prefetch(parts(following))
        following.set_modules_to_backward_prefetch(parts(block))


def materialize(root: nn.Module, device: torch.device, *, cpu_offload: bool = False) -> None:
    """Give the shards memory, on `device`, or with `cpu_offload` on the CPU (buffers always on `device`)."""
    root.to_empty(device="cpu" if cpu_offload else device)
    if cpu_offload and device.type != "cpu":
        for module in root.modules():
            for name, buffer in module.named_buffers(recurse=False):
                module._buffers[name] = buffer.to(device)


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
