"""Local shards with their boxes: those of all ranks tile the whole tensor, whatever it is sharded by."""

from __future__ import annotations

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Placement, Replicate, Shard, distribute_tensor

from cherry.distributed.local_part import local_part
from tests.cherry.fake_ranks import as_rank

RANKS = 4


@pytest.mark.parametrize(
    ("shape", "placements", "copies"),
    [
        ((8, 3), [Shard(0), Shard(0)], 1),
        ((7, 3), [Shard(0), Shard(0)], 1),
        ((2, 3), [Shard(0), Shard(0)], 1),  # two ranks hold nothing
        ((5, 6), [Shard(0), Shard(1)], 1),
        ((3, 5), [Replicate(), Shard(1)], 2),
    ],
)
def test_shards_of_all_ranks_tile_the_tensor(shape: tuple[int, ...], placements: list[Placement], copies: int) -> None:
    whole = torch.arange(shape[0] * shape[1]).view(shape)
    times = torch.zeros(shape, dtype=torch.int64)
    for rank in range(RANKS):
        with as_rank(rank, RANKS):
            mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("outer", "inner"))
            local, box = local_part(distribute_tensor(whole, mesh, placements, src_data_rank=None))
            where = tuple(slice(*bounds) for bounds in box)
            assert local.equal(whole[where])
            times[where] += 1
    assert (times == copies).all()


def test_a_plain_tensor_is_its_own_shard() -> None:
    tensor = torch.zeros(3, 2)
    local, box = local_part(tensor)
    assert local is tensor
    assert box == ((0, 3), (0, 2))
