"""Owns which rank does what: the axes of the configuration as device meshes, and what a rank reads of the data.

It knows nothing of models. A rank's number is ((replicate * shard + s) * context + c) * expert + e: the axes that talk
most are innermost, so that they stay inside a node.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from cherry.job_config import ParallelConfig


@dataclass(frozen=True)
class DataShare:
    """Which sequences of a batch a rank reads: every `ranks`-th from `rank` on, shared with its context ranks."""

    rank: int = 0
    ranks: int = 1
    context_rank: int = 0
    context_ranks: int = 1


@dataclass(frozen=True)
class Meshes:
    """One arrangement of the ranks, seen by dense parameters, by experts, and by the data.

    FSDP2 wants an expert's two axes under one root, and a dense parameter's ranks as one axis: hence two meshes over
    the same ranks.
    """

    dense: DeviceMesh
    """("fsdp",), or ("replicate", "fsdp")."""
    experts: DeviceMesh | None
    """("efsdp", "expert"), or ("replicate", "efsdp", "expert"); `None` where experts are sharded as all else."""
    context: dist.ProcessGroup | None
    """The ranks that share this rank's sequences; `None` when it has them for itself."""
    data: DataShare
    expert_nodes: tuple[dist.ProcessGroup, dist.ProcessGroup] | None = None
    """Where the experts' axis spans nodes: the ranks with this one's place in each of them, and those of its own."""

    @property
    def expert_shards(self) -> DeviceMesh:
        """The axes of the experts' mesh that FSDP2 gets."""
        assert self.experts is not None
        names = self.experts.mesh_dim_names or ()
        return self.experts[names[:-1]] if len(names) > 2 else self.experts[names[0]]


def build_meshes(config: ParallelConfig, device: torch.device) -> Meshes:
    """The meshes over all ranks of the default process group; every rank calls it."""
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
            device.type, (ranks // expert, expert // on_node, on_node), mesh_dim_names=("others", "node", "inside")
        )
        nodes = grid.get_group("node"), grid.get_group("inside")
    return Meshes(dense, experts, group, data_share(config, dist.get_rank(), ranks), nodes)


def data_share(config: ParallelConfig, rank: int, ranks: int) -> DataShare:
    """What rank `rank` of `ranks` reads."""
    outer, inner = divmod(rank, config.context * config.expert)
    context_rank, expert = divmod(inner, config.expert)
    return DataShare(outer * config.expert + expert, config.data_ranks(ranks), context_rank, config.context)


def _mesh(device: torch.device, *, replicate: int, **axes: int) -> DeviceMesh:
    """A mesh of these axes, with a replicate axis in front when there are copies."""
    named = {"replicate": replicate, **axes} if replicate > 1 else axes
    return init_device_mesh(device.type, tuple(named.values()), mesh_dim_names=tuple(named))
