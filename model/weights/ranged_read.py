"""Ranged reads: tensors filled from slices of stored ones, with coalesced, concurrent requests to remote storage.

Local files are memory-mapped. Of remote files, neighbouring slices are read by one request, several at a time.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor

from base.storage import Progress
from model.numerics.e4m3 import DTYPE as FP8
from model.numerics.fp8_blocks import SCALE_SUFFIX
from model.weights.reader import Source, dequantize_box, read_weight_box, scale_box
from model.weights.safetensors_file import Box, SafetensorsFile

# A piece is small enough that dequantizing takes little memory, and large enough that a request's delay is little.
_PIECE_BYTES = 16 << 20
_REQUEST_BYTES = 32 << 20
# Reading this many unneeded bytes costs less than another request: an object store answers in tens of milliseconds.
MAX_GAP_BYTES = 64 << 10
# One connection to an object store brings some 50 to 100 MB/s.
THREADS = 8
_REPORT_SECONDS = 2.0


class Request(NamedTuple):
    """Slice of a stored weight, and the target tensor of the same shape."""

    name: str
    box: Box
    target: Tensor


class _Range(NamedTuple):
    """Byte range of one file that is read at once, and the requests inside it."""

    file: SafetensorsFile
    start: int
    stop: int
    requests: list[Request]


@torch.no_grad()
def fill(
    source: Source,
    requests: Iterable[Request],
    *,
    on_progress: Progress | None = None,
    max_gap_bytes: int = MAX_GAP_BYTES,
    threads: int = THREADS,
) -> None:
    """Read every requested slice into its target; types and devices are the targets'.

    fp8 blocks are dequantized, except into a target that is fp8 itself.

    Args:
        max_gap_bytes: neighbours in one remote file that are at most this far apart are read by one request.
        threads: requests to remote storage at one time.

    Raises:
        WeightsError: a file ends before a tensor does.
        StorageError: reading failed.
    """
    pieces = [piece for request in requests for piece in _split(source, request)]
    meter = _Meter(sum(_bytes(source, piece) for piece in pieces), on_progress)
    if not pieces or source.remote_file(pieces[0].name) is None:
        for piece in pieces:
            if _is_dequantized(source, piece):
                piece.target.copy_(read_weight_box(source, piece.name, piece.box))
            else:
                piece.target.copy_(source.read_box(piece.name, piece.box))
            meter.add(_bytes(source, piece))
        return
    scales = [_scale_request(source, piece) for piece in pieces if _is_dequantized(source, piece)]
    # The scales come first, for they may be in another file: they are 1/4096 of the weights' bytes, and stay in memory.
    for scale, values in _read(source, scales, max_gap_bytes, threads):
        scale.target.copy_(values)
    scale_of = {(scale.name, scale.box): scale.target for scale in scales}
    for piece, values in _read(source, pieces, max_gap_bytes, threads):
        if _is_dequantized(source, piece):
            scale_values = scale_of[piece.name + SCALE_SUFFIX, scale_box(piece.box)]
            values = dequantize_box(values, scale_values, piece.box)
        piece.target.copy_(values)
        meter.add(_bytes(source, piece))


def _is_dequantized(source: Source, request: Request) -> bool:
    return source.dtype(request.name) == FP8 != request.target.dtype


def _bytes(source: Source, request: Request) -> int:
    return request.target.numel() * source.dtype(request.name).itemsize


def _split(source: Source, request: Request) -> Iterator[Request]:
    """Requests of whole rows that together make one request; none for an empty slice."""
    if not request.target.numel():
        return
    if not request.box:
        yield request
        return
    (first, last), *rest = request.box
    rows = max(1, _PIECE_BYTES * (last - first) // _bytes(source, request))
    for row in range(first, last, rows):
        stop = min(last, row + rows)
        yield Request(request.name, ((row, stop), *rest), request.target[row - first : stop - first])


def _scale_request(source: Source, piece: Request) -> Request:
    name, box = piece.name + SCALE_SUFFIX, scale_box(piece.box)
    return Request(name, box, torch.empty([last - first for first, last in box], dtype=source.dtype(name)))


def _read(
    source: Source, requests: list[Request], max_gap_bytes: int, threads: int
) -> Iterator[tuple[Request, Tensor]]:
    """Requests with their values, in file order; at most `threads` + 1 ranges are in memory at a time."""
    waiting: deque[tuple[_Range, Future[bytearray]]] = deque()
    with ThreadPoolExecutor(threads, thread_name_prefix="weights") as pool:
        for range_ in _ranges(source, requests, max_gap_bytes):
            waiting.append((range_, pool.submit(range_.file.read_range, range_.start, range_.stop)))
            if len(waiting) > threads:
                yield from _cut(*waiting.popleft())
        while waiting:
            yield from _cut(*waiting.popleft())


def _cut(range_: _Range, reading: Future[bytearray]) -> Iterator[tuple[Request, Tensor]]:
    data = reading.result()
    for request in range_.requests:
        yield request, range_.file.cut(request.name, request.box, data, range_.start)


def _ranges(source: Source, requests: list[Request], max_gap_bytes: int) -> Iterator[_Range]:
    """Coalesced byte ranges of the requests, ordered by file and offset."""
    placed = []
    for request in requests:
        file = source.remote_file(request.name)
        assert file is not None, "a source is remote as a whole, or not at all"
        placed.append((file.uri, *file.span(request.name, request.box), file, request))
    placed.sort(key=lambda entry: entry[:3])
    current: _Range | None = None
    for _, start, stop, file, request in placed:
        if current is not None and file is current.file:
            joined = max(stop, current.stop)
            if start - current.stop <= max_gap_bytes and joined - current.start <= _REQUEST_BYTES:
                current = current._replace(stop=joined)
                current.requests.append(request)
                continue
        if current is not None:
            yield current
        current = _Range(file, start, stop, [request])
    if current is not None:
        yield current


class _Meter:
    """Progress of a load: bytes, rate and time left, reported every two seconds and at the end."""

    def __init__(self, total: int, on_progress: Progress | None) -> None:
        self._total, self._done = total, 0
        self._on_progress = on_progress
        self._started = self._reported = time.monotonic()

    def add(self, count: int) -> None:
        """Count bytes that were copied into place, and report when due."""
        self._done += count
        now = time.monotonic()
        if self._on_progress is None or (now - self._reported < _REPORT_SECONDS and self._done < self._total):
            return
        self._reported = now
        rate = self._done / max(now - self._started, 1e-9)
        line = (
            f"read {_size(self._done)} of {_size(self._total)} of weights, {_size(rate)}/s, "
            f"{(self._total - self._done) / rate:.0f} s left"
        )
        self._on_progress(line, self._done / self._total)


def _size(count: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
