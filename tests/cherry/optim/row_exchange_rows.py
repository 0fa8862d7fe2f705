"""One rank of a check of the row exchange: rows to the owners of their matrices, and back.

    python row_exchange_rows.py STORE RANK RANKS

A failed assertion is the result.
"""

import sys

import torch
import torch.distributed as dist

from cherry.optim.row_exchange import RowExchange, ShardedRows, assign_owners

COLUMNS = (3, 4, 6, 2, 5)


def main(store: str, rank: int, ranks: int) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    generator = torch.Generator().manual_seed(0)
    # Shards of unequal numbers of rows, some of none.
    shares = [torch.randint(0, 5, (ranks,), generator=generator).tolist() for _ in COLUMNS]
    shares[0] = [0] * (ranks - 1) + [4]
    matrices = [ShardedRows(tuple(rows), columns) for rows, columns in zip(shares, COLUMNS, strict=True)]
    whole = [torch.randn(sum(matrix.rows_S), matrix.columns, generator=generator) for matrix in matrices]
    rows = [value.split(list(matrix.rows_S))[rank] for value, matrix in zip(whole, matrices, strict=True)]
    for owners in (assign_owners(matrices, [0] * ranks), [0] * len(matrices), [ranks - 1, 0, 0, ranks - 1, 0]):
        exchange = RowExchange(matrices, owners, dist.group.WORLD)
        own = exchange.gather(rows)
        expected = [value for value, owner in zip(whole, owners, strict=True) if owner == rank]
        assert len(own) == len(expected)
        assert all(found.equal(value) for found, value in zip(own, expected, strict=True))
        back = exchange.scatter([2 * value for value in own], like=rows[0])
        assert all(found.equal(2 * sent) for found, sent in zip(back, rows, strict=True))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
