"""One shard: its groups read in batches, quantized, measured, and written with a digest."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from base import storage
from base.errors import MissingFileError, WeightsError
from model.numerics.e4m3 import DTYPE as FP8
from model.numerics.formats import QuantizationFormat
from model.numerics.weight_kinds import layer_of
from model.quantization.calibrated import CalibratedFormat
from model.quantization.plan import Groups
from model.quantization.report import kind_of
from model.quantization.tensor_error import find_codes, measure, of_weight
from model.weights.ranged_read import Request, fill
from model.weights.reader import WeightsReader, scale_problem
from model.weights.safetensors_file import SafetensorsFile, whole_box, write_file

# Bytes of weights that are in memory beside what a shard is to hold: enough for requests to an object store to be
# large and concurrent.
_BATCH_BYTES = 256 << 20
OnRead = Callable[[int], None]
"""Callback: called with the stored bytes of weights that were dealt with since the last call."""


def quantize_shard(
    reader: WeightsReader,
    target_uri: str,
    quantization: QuantizationFormat,
    file: str,
    groups: Groups,
    on_read: OnRead | None = None,
) -> dict[str, Any]:
    """Record of one file of the target, as JSON values; the file is whole on the disk then.

    `file`, `bytes` and `sha256` of it (0 and `None` when no group begins in it, and none is written), `names` of its
    tensors, `bytes_before` of the source's file of that name and `bytes_after`, weights only, `tensors` and `kept` (see
    `quantize_groups`).

    Raises:
        WeightsError: the source is damaged.
        DiskFullError, StorageError: the file could not be read or written; nothing is left of it.
    """
    bytes_before = sum(_bytes(reader, name) for name in reader.names_in(file))
    kept: list[dict[str, Any]] = []
    tensors, rows = quantize_groups(reader, quantization, groups, on_read=on_read, kept=kept)
    hasher, size = hashlib.sha256(), 0
    if tensors:
        size = write_file(storage.join(target_uri, file), tensors, hasher)
    return {
        "file": file,
        "bytes": size,
        "sha256": hasher.hexdigest() if tensors else None,
        "names": list(tensors),
        "bytes_before": bytes_before,
        "bytes_after": sum(tensor.numel() * tensor.itemsize for tensor in tensors.values()),
        "tensors": rows,
        "kept": kept,
    }


@torch.no_grad()
def quantize_groups(
    reader: WeightsReader,
    quantization: QuantizationFormat,
    groups: Groups,
    *,
    on_read: OnRead | None = None,
    kept: list[dict[str, Any]] | None = None,
) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """Tensors to store for these groups, by name, and a row for each weight that was quantized.

    A row is JSON values: name, kind, layer, shape, bytes_before and bytes_after, and what `measure` returns.

    Args:
        kept: gets a row with name, kind, layer and bytes of each weight that keeps its type.
    """
    tensors: dict[str, Tensor] = {}
    rows: list[dict[str, Any]] = []
    for names, weights in _read(reader, groups):
        before = {name: _bytes(reader, name) for name in names}
        if isinstance(quantization, CalibratedFormat):
            weights = quantization.changed(weights)
        if quantization.group(names[0]) is None:
            tensors |= weights
            if kept is not None:
                kept += [_place(name) | {"bytes": weights[name].numel() * weights[name].itemsize} for name in names]
        else:
            stored = quantization.quantize(weights)
            tensors |= stored
            restorers = quantization.restorers(stored)
            for name, weight in weights.items():
                own = of_weight(stored, name)
                size = {"bytes_before": before[name], "bytes_after": sum(t.numel() * t.itemsize for t in own.values())}
                found = measure(weight, restorers[name], find_codes(own, name, weight.shape))
                rows.append(_place(name) | {"shape": list(weight.shape)} | size | found)
        if on_read is not None:
            on_read(sum(before.values()))
    return tensors, rows


def _place(name: str) -> dict[str, Any]:
    return {"name": name, "kind": kind_of(name), "layer": layer_of(name)}


def _bytes(reader: WeightsReader, name: str) -> int:
    info = reader.info(name)
    return info.stop - info.start


def _read(reader: WeightsReader, groups: Groups) -> Iterator[tuple[list[str], dict[str, Tensor]]]:
    """Names and weights of each group, in order."""
    if storage.is_local(reader.uri):
        yield from _read_local(reader, groups)
    else:
        yield from _read_remote(reader, groups)


def _read_local(reader: WeightsReader, groups: Groups) -> Iterator[tuple[list[str], dict[str, Tensor]]]:
    """Views of mapped files, which are closed after every batch, so that their pages are given up.

    The disk reads a batch while the one before it is quantized.
    """
    batches = list(_batches(reader, groups))
    _read_ahead(reader, batches[:1])
    for number, batch in enumerate(batches):
        _read_ahead(reader, batches[number + 1 : number + 2])
        for names in batch:
            yield names, {name: reader.read_weight(name) for name in names}
        for file in reader.files:
            reader.close(file)


def _read_ahead(reader: WeightsReader, batches: Sequence[Groups]) -> None:
    """Have the disk read the weights of these batches, as far as their files are whole."""
    by_file: dict[SafetensorsFile, list[str]] = {}
    for name in (name for batch in batches for names in batch for name in names):
        with suppress(WeightsError, MissingFileError):  # raised when it is read
            by_file.setdefault(reader.file_of(name), []).append(name)
    for file, names in by_file.items():
        file.read_ahead(names)


def _read_remote(reader: WeightsReader, groups: Groups) -> Iterator[tuple[list[str], dict[str, Tensor]]]:
    """Weights of batches that are fetched by concurrent requests, each while the one before it is quantized."""
    with ThreadPoolExecutor(1, thread_name_prefix="batch") as pool:
        waiting: tuple[Groups, Future[dict[str, Tensor]]] | None = None
        for batch in [*_batches(reader, groups), None]:
            fetching = None if batch is None else (batch, pool.submit(_fetch, reader, batch))
            if waiting is not None:
                fetched = waiting[1].result()
                for names in waiting[0]:
                    yield names, {name: fetched.pop(name) for name in names}
            waiting = fetching


def _batches(reader: WeightsReader, groups: Groups) -> Iterator[Groups]:
    """Consecutive groups of up to 256 MiB together, or one that is larger."""
    batch: Groups = []
    room = _BATCH_BYTES
    for names in groups:
        size = sum(_bytes(reader, name) for name in names)
        if batch and size > room:
            yield batch
            batch, room = [], _BATCH_BYTES
        batch.append(names)
        room -= size
    if batch:
        yield batch


def _fetch(reader: WeightsReader, groups: Groups) -> dict[str, Tensor]:
    """Weights by name in their stored type, fp8 dequantized to fp32.

    Raises:
        WeightsError: an fp8 tensor without scales of the right shape.
    """
    requests = []
    for name in (name for names in groups for name in names):
        if (problem := scale_problem(reader, name)) is not None:
            raise WeightsError(f"{reader.uri}: {problem}. Copy the folder again.")
        dtype = reader.dtype(name)
        target = torch.empty(reader.shape(name), dtype=torch.float32 if dtype == FP8 else dtype)
        requests.append(Request(name, whole_box(reader.shape(name)), target))
    fill(reader, requests)
    return {request.name: request.target for request in requests}
