"""Row exchange of sharded matrices: owners by cost, and rows that come back from their owners as they left."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from cherry.optim.row_exchange import RowExchange, ShardedRows, assign_owners


@pytest.mark.slow
def test_owners_get_whole_matrices_and_every_rank_its_rows_back(
    tmp_path: Path, run_together: Callable[[list[list[str]]], None]
) -> None:
    program = [sys.executable, str(Path(__file__).with_name("row_exchange_rows.py")), str(tmp_path / "store")]
    run_together([[*program, str(rank), "3"] for rank in range(3)])


def test_one_rank_owns_every_matrix(group: dist.ProcessGroup) -> None:
    matrices = [ShardedRows((3,), 2), ShardedRows((1,), 5)]
    rows = [torch.randn(3, 2), torch.randn(1, 5)]
    exchange = RowExchange(matrices, [0, 0], group)
    own = exchange.gather(rows)
    assert all(found.equal(sent) for found, sent in zip(own, rows, strict=True))
    assert all(found.equal(sent) for found, sent in zip(exchange.scatter(own, rows[0]), rows, strict=True))


def test_the_costliest_matrix_is_assigned_first_and_to_the_least_loaded_rank() -> None:
    small, large = ShardedRows((2, 2), 4), ShardedRows((8, 8), 16)
    assert (small.cost, large.cost) == (4 * 4 * 4, 16 * 16 * 16)
    loads = [0, 0]
    assert assign_owners([small, large, small, small], loads) == [1, 0, 1, 1]
    assert loads == [large.cost, 3 * small.cost]
    loads = [10 * large.cost, 0]
    assert assign_owners([large, large], loads) == [1, 1], "loads from before count"
