"""Token shards on disk: concatenated documents, read as sequences of a fixed length.

A document starts with bos and ends with eos. Neither occurs inside a document, so that boundaries can be found from
the tokens alone.

Shapes: S sequence, T sequence length.
"""

from __future__ import annotations

import os
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from base import storage
from base.errors import DataError, storage_errors

SHARD_TOKENS = 1 << 28


@dataclass(frozen=True)
class Manifest:
    """Description of prepared data: the content of manifest.json."""

    source: str
    digest: str
    """SHA-256 over every document's id and content, in order."""
    documents: int
    bytes: int
    tokens: int
    sequences: int
    sequence_length: int
    vocab_size: int
    bos_id: int
    eos_id: int
    token_type: str
    shards: list[str]
    shard_tokens: int
    masked: bool
    """True if each shard has a mask file (chat: only the assistant's tokens bear loss)."""
    heldout: dict[str, float]
    """`documents`, `bytes` and `zlib_bits_per_byte` of the held-out documents, uncut."""
    files: int = 0
    skipped_files: int = 0
    """Number of text files that are not UTF-8 and were left out."""


def read_manifest(directory: str) -> Manifest:
    """The manifest of a prepared directory.

    Raises:
        MissingFileError: the directory was never committed.
        DataError: manifest.json is not a manifest of this version.
    """
    storage.read_commit(directory)
    uri = storage.join(directory, "manifest.json")
    try:
        return Manifest(**storage.read_json(uri))
    except (TypeError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(
            f"{uri}: not a manifest of this version ({error}). Remove the folder and prepare again."
        ) from error


class ShardWriter:
    """Writes documents to train-00000.bin, train-00001.bin, ...; all but the last hold `shard_tokens` tokens.

    With `masked`, train-00000.mask holds one byte per token: 1 where the token bears loss.

    Raises:
        DiskFullError: no space is left.
    """

    def __init__(self, directory: Path, vocab_size: int, *, masked: bool, shard_tokens: int) -> None:
        self.dtype = np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)
        self.masked = masked
        self.tokens = 0
        self.names: list[str] = []
        self._shard_tokens = shard_tokens
        self._directory = directory
        self._open: list[BinaryIO] = []

    def add(self, tokens: list[int], bears: list[bool]) -> None:
        """Append one document.

        Args:
            bears: which of its tokens bear loss; ignored unless `masked`.
        """
        columns = [np.asarray(tokens, dtype=self.dtype)]
        if self.masked:
            columns.append(np.asarray(bears, dtype=np.uint8))
        done = 0
        with storage_errors(str(self._directory)):
            while done < len(tokens):
                room = self._shard_tokens - self.tokens % self._shard_tokens
                if room == self._shard_tokens:
                    self._next_shard()
                for handle, column in zip(self._open, columns, strict=True):
                    handle.write(column[done : done + room].data)
                self.tokens += min(room, len(tokens) - done)
                done += room

    def _next_shard(self) -> None:
        self._close()
        self.names.append(f"train-{len(self.names):05d}.bin")
        path = self._directory / self.names[-1]
        self._open = [open(name, "wb") for name in [path, path.with_suffix(".mask")][: 1 + self.masked]]  # noqa: SIM115

    def _close(self) -> None:
        """Close the open files after an fsync, which the commit marker relies on."""
        with ExitStack() as closing:
            handles, self._open = [closing.enter_context(handle) for handle in self._open], []
            for handle in handles:
                handle.flush()
                os.fsync(handle.fileno())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        with storage_errors(str(self._directory)):
            self._close()


class TokenDataset:
    """Packed sequences of a prepared directory, memory-mapped.

    Args:
        manifest: manifest of a directory that is not committed yet; `None` reads that of a committed directory.

    Raises:
        MissingFileError: the directory is not committed, or a shard is missing.
        DataError: the size of a shard is not the one in the manifest.
    """

    def __init__(self, directory: str, manifest: Manifest | None = None) -> None:
        self.manifest = manifest or read_manifest(directory)
        self._root = Path(storage.local_path(directory))
        self._shards = [self._map(name, np.dtype(self.manifest.token_type)) for name in self.manifest.shards]
        names = [name.replace(".bin", ".mask") for name in self.manifest.shards] if self.manifest.masked else []
        self._masks = [self._map(name, np.dtype(np.uint8)) for name in names]

    def _map(self, name: str, dtype: np.dtype[Any]) -> NDArray[Any]:
        path, manifest = self._root / name, self.manifest
        before = int(name.split("-")[1].split(".")[0]) * manifest.shard_tokens
        expected = min(manifest.shard_tokens, manifest.tokens - before) * dtype.itemsize
        with storage_errors(str(path)):
            found = path.stat().st_size
            if found != expected:
                raise DataError(f"{path}: {found} bytes, {expected} were written. Remove the folder and prepare again.")
            return np.memmap(path, dtype=dtype, mode="r")

    def __len__(self) -> int:
        return self.manifest.sequences

    def sequence(self, index: int) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Tokens [T+1] of a sequence, and which of them bear loss [T+1]; neighbours share one token."""
        tokens_ST, bears_ST = self.sequences(index, index + 1)
        return tokens_ST[0], bears_ST[0]

    def sequences(self, first: int, end: int) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Tokens [S, T+1] of the sequences from `first` up to `end`, and which of them bear loss [S, T+1]."""
        length = self.manifest.sequence_length
        start, stop = first * length, end * length + 1
        tokens = self._read(self._shards, start, stop).astype(np.int64)
        bears = np.ones(len(tokens), dtype=np.bool_)
        if self._masks:
            bears = self._read(self._masks, start, stop).astype(np.bool_)
        tokens_ST = sliding_window_view(tokens, length + 1, writeable=True)[::length]
        bears_ST = sliding_window_view(bears, length + 1, writeable=True)[::length]
        return tokens_ST, bears_ST

    def _read(self, shards: list[NDArray[Any]], start: int, end: int) -> NDArray[Any]:
        size = self.manifest.shard_tokens
        first, last = start // size, (end - 1) // size
        slices = [shards[i][max(start - i * size, 0) : end - i * size] for i in range(first, last + 1)]
        return slices[0] if len(slices) == 1 else np.concatenate(slices)
