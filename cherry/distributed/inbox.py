"""Memory that the other ranks of a node write gradients into, by copy engine.

Shapes: S ranks, N values of a parameter's part.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from cherry.distributed.peer_memory import PeerMemory
from cherry.parallel_rules import INBOX_VALUES


class Piece(NamedTuple):
    """Values of one parameter's part that travel together."""

    parameter: int
    """Its place among those that are sent."""
    first: int
    values: int
    at: int
    """Where they lie in a row of the inbox."""


class Inbox:
    """An inbox of every rank of a group, with a row for each of the others.

    Args:
        largest: values of the largest exchange; what has no room at once comes in several pieces.
    """

    def __init__(self, group: dist.ProcessGroup, largest: int, device: torch.device) -> None:
        self.ranks, self.rank = group.size(), group.rank()
        self._room = min(aligned(largest), aligned(INBOX_VALUES // (self.ranks - 1)))
        self._memory = PeerMemory(group, (self.ranks - 1) * self._room, torch.bfloat16, device)
        self._rows = [piece.view(self.ranks - 1, self._room) for piece in self._memory.ranks]

    def exchange(self, sent: Sequence[Tensor]) -> Iterator[tuple[Piece, Tensor]]:
        """Send row s of each tensor [S, N] to rank s. Gives pieces and what the others sent of them [S - 1, values].

        The current stream must be given all that reads a piece before the next one is asked for.
        """
        for pieces in pieces_of([parts_SN.shape[1] for parts_SN in sent], self._room):
            self._memory.barrier(0)  # nobody reads its inbox any more
            for step in range(1, self.ranks):  # the next one first: so that not all write to the same
                rank = (self.rank + step) % self.ranks
                row_N = self._rows[rank][self.rank - (self.rank > rank)]
                for parameter, first, values, at in pieces:
                    row_N[at : at + values].copy_(sent[parameter][rank, first : first + values], non_blocking=True)
            self._memory.barrier(1)
            for piece in pieces:
                yield piece, self._rows[self.rank][:, piece.at : piece.at + piece.values]


def aligned(values: int) -> int:
    """Values up to the next whole 256 bytes, where matmuls and copies want tensors to begin."""
    return -(-values // 128) * 128


def pieces_of(sizes: Sequence[int], room: int) -> Iterator[list[Piece]]:
    """Parts of these sizes, cut and packed into rows with room for so many values, where each begins aligned."""
    packed: list[Piece] = []
    at = 0
    for index, size in enumerate(sizes):
        first = 0
        while first < size:
            if at >= room:
                yield packed
                packed, at = [], 0
            values = min(size - first, room - at)
            packed.append(Piece(index, first, values, at))
            first, at = first + values, at + aligned(values)
    if packed:
        yield packed
