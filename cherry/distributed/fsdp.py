"""FSDP2 and HSDP sharding of a model, experts over the expert parallel group first, and initial values of each shard.

The only file that calls `fully_shard`. The full model is never on one rank: meta device, sharding, `to_empty`, then
each rank fills its own shard (from released weights: cherry/loading.py).
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

from cherry.distributed.expert_gather import GatherDispatcher
from cherry.distributed.expert_parallel import AllToAllDispatcher
from cherry.distributed.expert_parallel_nodes import HierarchicalDispatcher
from cherry.distributed.lane import Lane
from cherry.distributed.local_part import local_part
from cherry.distributed.mesh import Meshes, build_meshes
from cherry.distributed.peer_exchange import PeerExchange
from cherry.distributed.peer_memory import can_share
from cherry.job_config import CommunicationConfig, ParallelConfig
from cherry.parallel_rules import gathers_tokens, keeps_working_copies, shards_by_width
from model.experts import Experts, TokenDispatcher
from model.moe import MoE
from model.transformer import Block, DeepseekV3, initial_values


def build_mesh(config: ParallelConfig, device: torch.device) -> Meshes | None:
    """Meshes of all ranks; `None` for a single CPU rank, where sharding only costs time."""
    if dist.get_world_size() == 1 and device.type == "cpu":
        return None
    return build_meshes(config, device)


def keeps_resident_params(
    meshes: Meshes | None, precision: str, parallel: ParallelConfig, communication: CommunicationConfig | None = None
) -> bool:
    """True where half-precision parameters stay unsharded between passes (cherry/distributed/resident_params.py)."""
    if meshes is None or (communication is not None and communication.replicate != "fp32"):
        return False
    return keeps_working_copies(
        meshes.dense.size(),
        precision,
        cpu_offload=parallel.cpu_offload,
        reshard=parallel.reshard_after_forward is not False,
    )


def shard_model(
    root: nn.Module,
    meshes: Meshes | None,
    precision: str,
    parallel: ParallelConfig | None = None,
    *,
    resident: bool | None = None,
) -> None:
    """Shard every block of `root` as an FSDP module of its own, then the remaining parameters, in place.

    Parameters, gradient reduce-scatters and optimizer states are fp32; with bf16 or fp8 each block is all-gathered and
    computed in bf16. Gradients are summed over ranks: the loss is divided by the count of tokens of all of them.

    Args:
        resident: see `keeps_resident_params`, which decides for `None`.
    """
    if meshes is None:
        return
    parallel = parallel or ParallelConfig()
    if resident is None:
        resident = keeps_resident_params(meshes, precision, parallel)
    policies = _policies(meshes, precision, parallel, resident=resident)
    blocks = [module for module in root.modules() if isinstance(module, Block)]
    dispatcher = _dispatcher(meshes, root)
    for block in blocks:
        if meshes.experts is not None and isinstance(block.mlp, MoE):
            block.mlp.experts.dispatcher = dispatcher
            _shard_experts(block.mlp.experts, meshes, policies, reshard=parallel.reshard_after_forward is not False)
        fully_shard(
            block,
            mesh=meshes.dense,
            reshard_after_forward=parallel.reshard_after_forward,
            shard_placement_fn=_shard_placement_fn(block, meshes.dense),
            **policies,
        )
    fully_shard(root, mesh=meshes.dense, **policies)
    for module in root.modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)  # gloo has no premultiplied sum
            module.set_gradient_divide_factor(1.0)
    if meshes.experts is not None:
        _set_prefetch(root, blocks)


def _policies(meshes: Meshes, precision: str, parallel: ParallelConfig, *, resident: bool) -> dict[str, Any]:
    param_dtype = torch.bfloat16 if precision != "fp32" else None
    reduce_dtype = None if resident else torch.float32
    pinned = CPUOffloadPolicy(pin_memory=meshes.dense.device_type == "cuda")
    return {
        "mp_policy": MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=reduce_dtype),
        "offload_policy": pinned if parallel.cpu_offload else OffloadPolicy(),
    }


def _dispatcher(meshes: Meshes, root: nn.Module) -> TokenDispatcher | None:
    """How tokens come to the experts of other ranks: one for all layers."""
    if meshes.experts is None:
        return None
    if meshes.expert_nodes is not None:
        return HierarchicalDispatcher(*meshes.expert_nodes)
    group = meshes.experts["expert"].get_group()
    top_k = max((layer.config.num_experts_per_tok for layer in root.modules() if isinstance(layer, MoE)), default=0)
    cuda = meshes.dense.device_type == "cuda"
    device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    if can_share(group, device) and gathers_tokens(group.size(), top_k):
        return GatherDispatcher(*(PeerExchange(group, Lane(device)) for _ in range(2)))
    return AllToAllDispatcher(group)


def _shard_experts(experts: Experts, meshes: Meshes, policies: dict[str, Any], *, reshard: bool) -> None:
    """Shard a layer's experts over the expert parallel group, then each rank's own experts over the efsdp axis."""
    assert meshes.experts is not None
    mesh = meshes.experts["expert"]
    for name, parameter in list(experts.named_parameters()):
        own = torch.empty(parameter.shape[0] // mesh.size(), *parameter.shape[1:], device="meta")
        setattr(experts, name, nn.Parameter(DTensor.from_local(own, mesh, [Shard(0)], run_check=False)))
    shards = meshes.expert_shards
    placement = _shard_placement_fn(experts, shards)
    fully_shard(experts, mesh=shards, reshard_after_forward=reshard, shard_placement_fn=placement, **policies)


def _shard_placement_fn(module: nn.Module, mesh: DeviceMesh) -> Any:
    """Function from a parameter to its shard dimension: 0, but 1 for experts that dimension 0 shards unevenly.

    At 2,048 ranks 256 experts sharded on dimension 0 would be padded eightfold.
    """
    ranks = mesh.size(-1)
    fused = {
        parameter for experts in module.modules() if isinstance(experts, Experts) for parameter in experts.parameters()
    }

    def place(parameter: nn.Parameter) -> Shard | None:
        if parameter not in fused:
            return None
        own_unit = isinstance(parameter, DTensor)
        rows = parameter.to_local().shape[0] if isinstance(parameter, DTensor) else parameter.shape[0]
        return Shard(1) if shards_by_width(rows, parameter.shape[1], ranks, expert_parallel=own_unit) else None

    return place


def _set_prefetch(root: nn.Module, blocks: list[Block]) -> None:
    """Set explicit prefetching: FSDP2's implicit prefetching does not cover expert modules nested in blocks.

    While a block computes, the dense parameters and experts of the next block are all-gathered, in the backward pass
    those of the block before it.
    """

    def fsdp_modules(block: Block) -> list[FSDPModule]:
        inner = [block.mlp.experts] if isinstance(block.mlp, MoE) else []
        return [module for module in (block, *inner) if isinstance(module, FSDPModule)]

    assert isinstance(root, FSDPModule)
    root.set_modules_to_forward_prefetch(fsdp_modules(blocks[0]))
    root.set_modules_to_backward_prefetch(fsdp_modules(blocks[-1]))
    for block, following in pairwise(blocks):
        assert isinstance(block, FSDPModule)
        assert isinstance(following, FSDPModule)
        block.set_modules_to_forward_prefetch(fsdp_modules(following))
        following.set_modules_to_backward_prefetch(fsdp_modules(block))


def materialize(root: nn.Module, device: torch.device, *, cpu_offload: bool = False) -> None:
    """Allocate the shards on `device`, or with `cpu_offload` on the CPU (buffers always on `device`)."""
    root.to_empty(device="cpu" if cpu_offload else device)
    if cpu_offload and device.type != "cpu":
        for module in root.modules():
            for name, buffer in module.named_buffers(recurse=False):
                module._buffers[name] = buffer.to(device)


@torch.no_grad()
def initialize(model: DeepseekV3, seed: int) -> None:
    """Initialize weights at random, each parameter's rows by name and position: the same at every world size."""
    std = model.config.initializer_range
    for name, parameter in model.named_parameters():
        local, box = local_part(parameter)
        if local.numel():
            values = initial_values(name, parameter.shape, seed=seed, std=std, rows=box[0])
            local.copy_(values[(slice(None), *(slice(*range_) for range_ in box[1:]))])
    for buffer in model.buffers():
        buffer.zero_()
