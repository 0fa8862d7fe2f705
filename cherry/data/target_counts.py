"""Loss-bearing targets per sequence: counted once, when data is prepared, and looked up for each batch.

With them every rank knows the token counts by which the losses of the whole optimizer step are divided, before its
first forward pass and without a collective. Which targets bear loss is defined by cherry/data/collate.py.

Shapes: S sequence, T sequence length; columns are the model's own targets and the MTP module's.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from base.errors import DataError, storage_errors
from cherry.data.shards import TokenDataset

FILE_NAME = "target_counts.npy"
# 4 M tokens, as int64, and the boolean temporaries take about 60 MB.
_CHUNK_TOKENS = 1 << 22


def count_targets(
    tokens_ST: NDArray[np.int64], bears_ST: NDArray[np.bool_], bos_id: int, *, keep_apart: bool
) -> NDArray[np.int32]:
    """Number of targets that bear loss per sequence, [S, 2].

    Args:
        tokens_ST: the T + 1 tokens of each sequence.
        bears_ST: which of these tokens bear loss as a target.
        keep_apart: attention stays within documents, and no target crosses their boundaries.
    """
    targets_ST = bears_ST[:, 1:]
    mtp_ST = targets_ST[:, 1:]
    if keep_apart:
        inside_ST = tokens_ST[:, 1:] != bos_id
        targets_ST = targets_ST & inside_ST
        mtp_ST = targets_ST[:, 1:] & inside_ST[:, :-1]
    return np.stack([targets_ST.sum(axis=1), mtp_ST.sum(axis=1)], axis=1, dtype=np.int32)


def write_target_counts(dataset: TokenDataset, directory: Path, *, chunk_tokens: int = _CHUNK_TOKENS) -> None:
    """Write the counts of all sequences, int32 [S, 2, 2]; the middle axis is `keep_apart` false, true.

    Args:
        dataset: need not be committed yet.
        chunk_tokens: tokens that are counted at a time.

    Raises:
        DiskFullError: no space is left.
    """
    manifest, path = dataset.manifest, directory / FILE_NAME
    chunk = max(1, chunk_tokens // manifest.sequence_length)
    with storage_errors(str(path)), path.open("wb") as file:
        shape = (manifest.sequences, 2, 2)
        np.lib.format.write_array_header_1_0(file, {"descr": "<i4", "fortran_order": False, "shape": shape})
        for start in range(0, manifest.sequences, chunk):
            tokens_ST, bears_ST = dataset.sequences(start, min(start + chunk, manifest.sequences))
            counts = [count_targets(tokens_ST, bears_ST, manifest.bos_id, keep_apart=apart) for apart in (False, True)]
            file.write(np.stack(counts, axis=1).astype("<i4").tobytes())
        file.flush()
        os.fsync(file.fileno())  # before the data is committed: zeros after a power cut would scale losses wrongly


class TargetCounts:
    """Target counts of batches: from the file, or from the tokens where data was prepared without the file.

    Args:
        directory: folder of the prepared data.
        keep_apart: see `count_targets`.

    Raises:
        DataError: the file is not of this data.
    """

    def __init__(self, dataset: TokenDataset, directory: Path, *, keep_apart: bool) -> None:
        self._dataset = dataset
        self._keep_apart = keep_apart
        self._table: NDArray[np.int32] | None = None
        path = directory / FILE_NAME
        # Without masks and boundaries every target bears loss, and nothing has to be looked up.
        self._constant = not keep_apart and not dataset.manifest.masked
        if not self._constant and path.exists():
            self._table = _map_table(path, dataset.manifest.sequences)[:, int(keep_apart)]

    def of(self, indices: NDArray[np.int64]) -> tuple[int, int]:
        """Number of targets of these sequences that bear loss: the model's, and the MTP module's."""
        length = self._dataset.manifest.sequence_length
        if self._constant:
            return len(indices) * length, len(indices) * (length - 1)
        if self._table is not None:
            counts = self._table[indices]
        else:
            rows = [self._dataset.sequence(int(index)) for index in indices]
            tokens_ST, bears_ST = (np.stack(column) for column in zip(*rows, strict=True))
            counts = count_targets(tokens_ST, bears_ST, self._dataset.manifest.bos_id, keep_apart=self._keep_apart)
        targets, mtp_targets = counts.sum(axis=0, dtype=np.int64)
        return int(targets), int(mtp_targets)


def _map_table(path: Path, sequences: int) -> NDArray[np.int32]:
    with storage_errors(str(path)):
        try:
            table: NDArray[np.int32] = np.load(path, mmap_mode="r")
        except ValueError as error:
            raise DataError(f"{path}: not an array ({error}). Remove the folder and prepare again.") from error
    if table.shape != (sequences, 2, 2) or table.dtype != np.int32:
        raise DataError(
            f"{path}: must hold int32 of shape {(sequences, 2, 2)}, got {table.dtype} of {table.shape}. Remove the "
            "folder and prepare again."
        )
    return table
