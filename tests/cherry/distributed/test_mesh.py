"""Device meshes: the ranks of each axis, and the data shard of each rank."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from cherry.distributed.mesh import DataShard, build_meshes, data_shard
from cherry.job_config import ParallelConfig
from tests.cherry.fake_ranks import as_rank


def test_context_ranks_share_sequences_and_no_other_ranks_do() -> None:
    config = ParallelConfig(replicate=2, shard=3, expert=2, context=2)
    shares = [data_shard(config, rank, 24) for rank in range(24)]
    assert sorted((share.data_rank, share.context_rank) for share in shares) == [
        (rank, part) for rank in range(12) for part in (0, 1)
    ]
    assert {(share.data_ranks, share.context_ranks) for share in shares} == {(12, 2)}
    # Neighbours hold different experts and read different sequences; the next two have the other halves of these.
    assert shares[:4] == [
        DataShard(0, 12, 0, 2),
        DataShard(1, 12, 0, 2),
        DataShard(0, 12, 1, 2),
        DataShard(1, 12, 1, 2),
    ]


def test_groups_of_a_rank_are_those_of_its_number() -> None:
    """A rank's number is ((replicate * shard + s) * context + c) * expert + e."""
    config = ParallelConfig(replicate=2, shard=2, context=2, expert=2)
    for rank in range(16):
        with as_rank(rank, 16):
            meshes = build_meshes(config, torch.device("cpu"))
            assert meshes.context is not None and meshes.experts is not None
            assert dist.get_process_group_ranks(meshes.context) == [rank & ~2, rank | 2]
            half = range(8) if rank < 8 else range(8, 16)
            assert dist.get_process_group_ranks(meshes.dense.get_group("fsdp")) == [*half]
            assert dist.get_process_group_ranks(meshes.dense.get_group("replicate")) == [rank % 8, rank % 8 + 8]
            assert dist.get_process_group_ranks(meshes.experts.get_group("expert")) == [rank & ~1, rank | 1]
            own = [other for other in half if other % 2 == rank % 2]
            assert dist.get_process_group_ranks(meshes.experts.get_group("efsdp")) == own
            assert meshes.expert_shards.mesh_dim_names == ("replicate", "efsdp")
            assert meshes.data == data_shard(config, rank, 16)
            assert meshes.expert_nodes is None


def test_an_expert_axis_over_nodes_has_an_internode_and_an_intranode_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with as_rank(5, 8):
        meshes = build_meshes(ParallelConfig(expert=4), torch.device("cpu"))
        assert meshes.expert_nodes is not None
        internode, intranode = meshes.expert_nodes
        assert dist.get_process_group_ranks(internode) == [5, 7]
        assert dist.get_process_group_ranks(intranode) == [4, 5]
        assert meshes.expert_shards.mesh_dim_names == ("efsdp",)


def test_without_axes_the_data_parallel_mesh_is_all_there_is() -> None:
    with as_rank(1, 4):
        meshes = build_meshes(ParallelConfig(), torch.device("cpu"))
        assert meshes.dense.mesh_dim_names == ("fsdp",)
        assert meshes.dense.size() == 4
        assert (meshes.experts, meshes.context, meshes.expert_nodes) == (None, None, None)
        assert meshes.data == DataShard(1, 4)
