"""Row exchange: matrices whose rows are sharded over ranks, gathered on one owner rank each, and scattered back.

Every rank owns its share of the matrices, by their cost, so that an unsharded matrix is worked on once and not on
every rank. Both ways are one all-to-all of rows.

Shapes: M rows, N columns of a matrix; S rank of the group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class ShardedRows:
    """One matrix [M, N] of which every rank of a group holds some consecutive rows."""

    rows_S: tuple[int, ...]
    """Rows on each rank, in the order of the ranks."""
    columns: int

    @property
    def cost(self) -> int:
        """Relative cost of orthogonalizing the matrix."""
        rows = sum(self.rows_S)
        return rows * self.columns * min(rows, self.columns)


def assign_owners(matrices: Sequence[ShardedRows], loads_S: list[int]) -> list[int]:
    """The owner of each matrix: the costliest first, each to the rank with the least to do; `loads_S` grows by them."""
    owners = [0] * len(matrices)
    for index in sorted(range(len(matrices)), key=lambda index: -matrices[index].cost):
        owners[index] = min(range(len(loads_S)), key=loads_S.__getitem__)
        loads_S[owners[index]] += matrices[index].cost
    return owners


class RowExchange:
    """All-to-all of matrices' rows to their owner ranks and back. Every rank of the group takes part in every call.

    Args:
        matrices: the same on every rank.
        owners: owner of each matrix, a rank of the group.
    """

    def __init__(self, matrices: Sequence[ShardedRows], owners: Sequence[int], group: dist.ProcessGroup) -> None:
        self._group = group
        self._matrices = matrices
        rank, ranks = dist.get_rank(group), dist.get_world_size(group)
        self._by_owner = sorted(range(len(matrices)), key=owners.__getitem__)
        self._own = [index for index in self._by_owner if owners[index] == rank]
        self._here = [matrices[index].rows_S[rank] * matrices[index].columns for index in self._by_owner]
        """Elements of this rank's rows of each matrix, by owner."""
        self._own_rows = [[matrices[index].rows_S[source] for index in self._own] for source in range(ranks)]
        own_columns = [matrices[index].columns for index in self._own]
        self._there = [[m * n for m, n in zip(rows, own_columns, strict=True)] for rows in self._own_rows]
        """Elements of each rank's rows of this rank's own matrices."""
        self._to_owner = [0] * ranks
        for index, elements in zip(self._by_owner, self._here, strict=True):
            self._to_owner[owners[index]] += elements

    def gather(self, rows: Sequence[Tensor]) -> list[Tensor]:
        """This rank's own matrices, unsharded [M, N], of one type.

        Args:
            rows: this rank's rows of every matrix, in the order of `matrices`; some may have none.
        """
        sent = torch.cat([rows[index].flatten() for index in self._by_owner])
        received = self._all_to_all(sent, self._to_owner, [sum(elements) for elements in self._there])
        if not self._own:
            return []
        blocks = torch.split(received, [elements for source in self._there for elements in source])
        return [
            torch.cat([block.view(-1, self._matrices[index].columns) for block in blocks[place :: len(self._own)]])
            for place, index in enumerate(self._own)
        ]

    def scatter(self, matrices: Sequence[Tensor], like: Tensor) -> list[Tensor]:
        """This rank's rows of every matrix, in the order of the constructor's.

        Args:
            matrices: this rank's own, in the order that `gather` gives.
            like: a tensor of their type and device, where this rank owns none.
        """
        ends = [list(accumulate(rows, initial=0)) for rows in zip(*self._own_rows, strict=True)]
        blocks = [
            matrix[ends[place][source] : ends[place][source + 1]].flatten()
            for source in range(len(self._own_rows))
            for place, matrix in enumerate(matrices)
        ]
        sent = torch.cat(blocks) if blocks else like.new_empty(0)
        received = self._all_to_all(sent, [sum(elements) for elements in self._there], self._to_owner)
        found = dict(zip(self._by_owner, torch.split(received, self._here), strict=True))
        return [found[index].view(-1, matrix.columns) for index, matrix in enumerate(self._matrices)]

    def _all_to_all(self, sent: Tensor, to: list[int], back: list[int]) -> Tensor:
        received = sent.new_empty(sum(back))
        dist.all_to_all_single(received, sent, back, to, group=self._group)
        return received
