"""One process in the place of any rank of a group, with torch's fake backend, which sends nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist
from torch.distributed.tensor.debug import _clear_sharding_prop_cache
from torch.testing._internal.distributed.fake_pg import FakeStore


@contextmanager
def as_rank(rank: int, ranks: int) -> Iterator[None]:
    """Make this process rank `rank` of `ranks`: enough for meshes and local shards, which need no communication."""
    _clear_sharding_prop_cache()  # keyed by meshes that compare equal between ranks
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=ranks)
    try:
        yield
    finally:
        dist.destroy_process_group()
