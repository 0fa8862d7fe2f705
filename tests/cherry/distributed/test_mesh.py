"""Device meshes: the ranks of each axis, and the data shard of each rank."""

from __future__ import annotations

from cherry.distributed.mesh import DataShard, data_shard
from cherry.job_config import ParallelConfig


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
