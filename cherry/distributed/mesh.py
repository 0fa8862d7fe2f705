"""Device meshes of the data parallel, context parallel and expert parallel axes, and the data shard of each rank.

A rank's number is ((r * shard + s) * context + c) * expert + e, for the replicate (HSDP), shard (FSDP), context
parallel and expert parallel axes: those with the most traffic are innermost, so that they stay inside a node.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from cherry.job_config import ParallelConfig


@dataclass(frozen=True)
class DataShard:
    """Shard of a batch that a rank reads: every `data_ranks`-th sequence from `data_rank` on, its context positions."""

    data_rank: int = 0
    data_ranks: int = 1
    context_rank: int = 0
    context_ranks: int = 1


@dataclass(frozen=True)
class Meshes:
    """Meshes of all ranks for dense parameters, for routed experts and for the data.

    FSDP2 wants an expert's two axes under one root mesh, and a dense parameter's ranks as one axis: hence two meshes
    over the same ranks.
    """

    dense: DeviceMesh
    """Axes ("fsdp",), or ("replicate", "fsdp") for HSDP."""
    experts: DeviceMesh | None
    """Axes ("efsdp", "expert"), or ("replicate", "efsdp", "expert"); `None` without expert parallelism."""
    context: dist.ProcessGroup | None
    """Context parallel group of this rank; `None` without context parallelism."""
    data: DataShard
    expert_nodes: tuple[dist.ProcessGroup, dist.ProcessGroup] | None = None
    """Internode and intranode group of this rank, where the expert axis spans nodes: the ranks with this rank's index
    within each node, and those of its own node."""

    @property
    def expert_shards(self) -> DeviceMesh:
        """Mesh that FSDP2 shards experts over: the experts' mesh without its expert axis."""
        assert self.experts is not None
        names = self.experts.mesh_dim_names or ()
        return self.experts[names[:-1]] if len(names) > 2 else self.experts[names[0]]


def build_meshes(config: ParallelConfig, device: torch.device) -> Meshes:
    """Meshes over all ranks of the default process group; a collective of all of them."""
    ranks = dist.get_world_size()
    replicate, expert, context = config.replicate, config.expert, config.context
    shard = config.shard_ranks(ranks)
    if replicate * shard * expert * context != ranks:
        axes = {"replicate": replicate, "shard": shard, "expert": expert, "context": context}
        raise AssertionError(f"{axes} over {ranks} ranks: the configuration was not checked")
    dense = _mesh(device, replicate=replicate, fsdp=shard * context * expert)
    experts = _mesh(device, replicate=replicate, efsdp=shard * context, expert=expert) if expert > 1 else None
    group = None
    if context > 1:
        grid = init_device_mesh(
            device.type, (replicate * shard, context, expert), mesh_dim_names=("data", "context", "expert")
        )
        group = grid.get_group("context")
    nodes = None
    if (on_node := config.experts_on_node(int(os.environ.get("LOCAL_WORLD_SIZE", ranks)))) < expert:
        grid = init_device_mesh(
            device.type,
            (ranks // expert, expert // on_node, on_node),
            mesh_dim_names=("outer", "internode", "intranode"),
        )
        nodes = grid.get_group("internode"), grid.get_group("intranode")
    return Meshes(dense, experts, group, data_shard(config, dist.get_rank(), ranks), nodes)


def data_shard(config: ParallelConfig, rank: int, ranks: int) -> DataShard:
    """Data shard of rank `rank` of `ranks`."""
    outer, inner = divmod(rank, config.context * config.expert)
    context_rank, expert = divmod(inner, config.expert)
    return DataShard(outer * config.expert + expert, config.data_ranks(ranks), context_rank, config.context)


def _mesh(device: torch.device, *, replicate: int, **axes: int) -> DeviceMesh:
    """Device mesh of these axes, with a replicate axis in front for HSDP."""
    named = {"replicate": replicate, **axes} if replicate > 1 else axes
    return init_device_mesh(device.type, tuple(named.values()), mesh_dim_names=tuple(named))
