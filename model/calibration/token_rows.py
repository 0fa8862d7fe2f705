"""Hidden states of the calibration documents, one row a token, in memory-mapped files.

The operating system keeps of them in memory what it has room for. Documents run whole, each by itself; neighbours of
the same length run together.

Shapes: N token of all documents, B document, T position, D hidden.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

# Tokens that run through a block together.
_BATCH_TOKENS = 8192


class Batch(NamedTuple):
    """Documents of one length: rows `first` to `first + documents * length`."""

    first: int
    documents: int
    length: int

    def of(self, rows: Tensor) -> Tensor:
        """View [B, T, ...] of this batch's rows."""
        last = self.first + self.documents * self.length
        return rows[self.first : last].view(self.documents, self.length, *rows.shape[1:])


def batches_of(documents: Sequence[Tensor]) -> Iterator[Batch]:
    """Batches that cover the documents' tokens in order; one longer than a batch runs alone."""
    first = start = 0
    while start < len(documents):
        length, stop = len(documents[start]), start + 1
        most = max(1, _BATCH_TOKENS // max(length, 1))
        while stop < len(documents) and stop - start < most and len(documents[stop]) == length:
            stop += 1
        yield Batch(first, stop - start, length)
        first, start = first + (stop - start) * length, stop


def map_rows(path: Path, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Rows [N, D] in a file, made if it is not there; what is written to them is in the file."""
    return torch.from_file(str(path), shared=True, size=math.prod(shape), dtype=dtype).view(shape)


def sync(path: Path) -> None:
    """Return when the rows written so far are on the disk."""
    descriptor = os.open(path, os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
