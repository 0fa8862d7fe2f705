"""Order in which training reads sequences: a pure function of a seed and a position, without stored state."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# Luby and Rackoff 1988 need 4 rounds with perfect round functions; twice that for a plain mixer on few bits.
_ROUNDS = 8


@dataclass(frozen=True)
class Sampler:
    """Sequences of each optimizer step: a seeded permutation per epoch, one epoch after the other.

    The order depends on the seed and the position only (a number of sequences): it is the same for any number of ranks,
    and continues at the same place when the batch size changes. A batch may span two epochs, so that no sequence is
    left out and every batch is full. Any position is computed directly, at the same cost for any length.
    """

    length: int
    seed: int
    batch_size: int

    def indices(self, position: int, data_rank: int = 0, data_ranks: int = 1) -> NDArray[np.int64]:
        """Sequence ids of a rank in the batch that begins at `position`: every `data_ranks`-th of the batch.

        Empty for ranks beyond the batch size.

        Args:
            position: number of sequences before the batch, over all ranks.
        """
        positions = np.arange(position + data_rank, position + self.batch_size, data_ranks, dtype=np.int64)
        chosen = np.empty_like(positions)
        for epoch in np.unique(positions // self.length):
            here = positions // self.length == epoch
            chosen[here] = permuted(positions[here] % self.length, self.length, seed=self.seed, epoch=int(epoch))
        return chosen


def permuted(places: NDArray[np.int64], length: int, *, seed: int, epoch: int) -> NDArray[np.int64]:
    """Images of `places` under a seeded permutation of range(length).

    A Feistel network permutes the numbers of an even number of bits; a result that is not below `length` is permuted
    again until it is (cycle walking, Black and Rogaway 2002, "Ciphers with arbitrary finite domains").
    """
    half = np.uint64(max(1, ((length - 1).bit_length() + 1) // 2))
    low = (np.uint64(1) << half) - np.uint64(1)
    # Not numpy's generator, whose stream may change with its version: a resumed run must read the same order.
    digest = hashlib.shake_256(f"{seed}:{epoch}".encode()).digest(8 * _ROUNDS)
    keys = np.frombuffer(digest, dtype="<u8").astype(np.uint64)
    result = places.astype(np.uint64)
    outside = np.ones(len(result), dtype=np.bool_)
    while outside.any():
        values = result[outside]
        left, right = values >> half, values & low
        for key in keys:
            left, right = right, left ^ (_mix(right ^ key) & low)
        result[outside] = (left << half) | right
        outside = result >= np.uint64(length)
    return result.astype(np.int64)


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finalizer of SplitMix64 (Steele, Lea and Flood 2014, figure 19), modulo 2^64."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
