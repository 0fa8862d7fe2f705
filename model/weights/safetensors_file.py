"""One safetensors file by URI: header, checks, tensors or slices of them, and writing.

Local files are memory-mapped; of remote ones exactly the requested bytes are read.
Format: 8 bytes little-endian header length, JSON header, then the tensors' bytes.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import threading
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, Protocol, TypeGuard

import safetensors
import torch
from fsspec.core import url_to_fs
from torch import Tensor

from base import storage
from base.errors import WeightsError, storage_errors

# In the order in which the library lays tensors out: by alignment, largest first.
_DTYPES = {
    "I64": torch.int64,
    "F64": torch.float64,
    "F32": torch.float32,
    "I32": torch.int32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I16": torch.int16,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
# The format's own limit on a header; a larger number is not a header.
_MAX_HEADER_BYTES = 100_000_000
# A block that is hashed and written is still in a processor's second-level cache.
_WRITE_BYTES = 1 << 20


class TensorInfo(NamedTuple):
    """Header entry of one tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    """Offset of the first byte in the file."""
    stop: int


class Hasher(Protocol):
    """A running digest, like hashlib's."""

    def update(self, data: bytes | memoryview, /) -> object:
        """Add bytes."""


Box = tuple[tuple[int, int], ...]
"""A slice of a tensor: first and one past the last index of each dimension."""


def whole_box(shape: tuple[int, ...]) -> Box:
    """Box that covers all of a tensor."""
    return tuple((0, size) for size in shape)


class SafetensorsFile:
    """One open file. The header is read and checked against the file's size on construction.

    Args:
        store: fsspec file system of `uri`, for callers that open many files: fsspec makes another one, with
            connections of its own, in every thread.

    Raises:
        MissingFileError: nothing at `uri`.
        WeightsError: truncated or malformed; names the file and, where it can, the tensor.
    """

    def __init__(self, uri: str, store: Any = None) -> None:
        self.uri = uri
        self.is_local = storage.is_local(uri)
        self._store = store if store is not None else open_store(uri)
        self.tensors = self._read_header()
        self._mapped: Any = None

    def read(self, name: str) -> Tensor:
        """One tensor on the CPU. Of a local file it is a view of the mapped pages: copy before writing to it."""
        return self.read_box(name, whole_box(self.tensors[name].shape))

    def read_box(self, name: str, box: Box) -> Tensor:
        """Slice of a tensor on the CPU. Of a local file it is a view of mapped pages, read when they are touched."""
        if self.is_local:
            if self._mapped is None:
                self._mapped = _map(self.uri)
            tensor: Tensor = self._mapped.get_tensor(name)
            return tensor[tuple(slice(*bounds) for bounds in box)]
        start, stop = self.span(name, box)
        return self.cut(name, box, self.read_range(start, stop), start)

    def read_ahead(self, names: Iterable[str]) -> None:
        """Have the system read tensors of a local file into its cache meanwhile, where it knows how."""
        if not self.is_local or not hasattr(os, "posix_fadvise"):
            return
        descriptor = os.open(storage.local_path(self.uri), os.O_RDONLY)
        try:
            for name in names:
                info = self.tensors[name]
                if info.start == info.stop:
                    continue  # no bytes mean all up to the end there
                os.posix_fadvise(descriptor, info.start, info.stop - info.start, os.POSIX_FADV_WILLNEED)
        finally:
            os.close(descriptor)

    def span(self, name: str, box: Box) -> tuple[int, int]:
        """Byte range of a slice in the file: first, and one past the last.

        Rows are contiguous. The span of a range of columns includes the bytes between, so that one request reads it.
        """
        info = self.tensors[name]
        if any(first >= last for first, last in box):
            return info.start, info.start
        strides = _strides(info.shape)
        first = sum(bounds[0] * stride for bounds, stride in zip(box, strides, strict=True))
        last = sum((bounds[1] - 1) * stride for bounds, stride in zip(box, strides, strict=True))
        return info.start + first * info.dtype.itemsize, info.start + (last + 1) * info.dtype.itemsize

    def cut(self, name: str, box: Box, data: bytearray, data_start: int) -> Tensor:
        """Slice of a tensor as a view of `data`, the bytes of the file from `data_start` on, which cover its span.

        Raises:
            WeightsError: they end before it does: the file was truncated after it was opened.
        """
        info = self.tensors[name]
        start, stop = (place - data_start for place in self.span(name, box))
        if stop > len(data):
            raise _truncated(self.uri, name, info, data_start + len(data))
        sizes = [last - first for first, last in box]
        if start == stop:
            return torch.empty(sizes, dtype=info.dtype)
        if start % info.dtype.itemsize:
            data, start, stop = data[start:stop], 0, stop - start
        flat = torch.frombuffer(data, dtype=info.dtype, offset=start, count=(stop - start) // info.dtype.itemsize)
        return flat.as_strided(sizes, _strides(info.shape))

    def read_range(self, start: int, stop: int) -> bytearray:
        """Bytes of the file, fewer if it ends before; thread-safe."""
        if stop <= start:
            return bytearray()
        with storage_errors(self.uri):
            return bytearray(self._store.cat_file(self.uri, start=start, end=stop))

    def _read_header(self) -> dict[str, TensorInfo]:
        uri = self.uri
        with storage_errors(uri):
            size = int(self._store.info(uri)["size"])
        length = int.from_bytes(self.read_range(0, min(8, size)), "little")
        if size < 8 or length > _MAX_HEADER_BYTES:
            raise _malformed(uri, f"it has {size} bytes and its first 8 are no header length")
        if size < 8 + length:
            raise _malformed(uri, f"its header should be {length} bytes long and the file has {size}: it is truncated")
        text = self.read_range(8, 8 + length)
        try:
            raw = json.loads(text)
            raw.pop("__metadata__", None)
            tensors = {name: _parse(uri, name, entry, 8 + length) for name, entry in raw.items()}
        except WeightsError:
            raise
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise _malformed(uri, f"its header cannot be read ({type(error).__name__}: {error})") from error
        for name, info in sorted(tensors.items(), key=lambda item: item[1].stop):
            if info.stop - info.start != math.prod(info.shape) * info.dtype.itemsize:
                raise _malformed(uri, f"tensor {name} of shape {list(info.shape)} has {info.stop - info.start} bytes")
            if info.stop > size:
                raise _truncated(uri, name, info, size)
        return tensors


def open_store(uri: str) -> Any:
    """fsspec file system of `uri`, without a listings cache, for another host may have written since."""
    with storage_errors(uri):
        return url_to_fs(uri, use_listings_cache=False)[0]


def _strides(shape: tuple[int, ...]) -> list[int]:
    return [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]


def _map(uri: str) -> Any:
    try:
        return safetensors.safe_open(storage.local_path(uri), framework="pt")
    except safetensors.SafetensorError as error:
        raise _malformed(uri, str(error)) from error


def _parse(uri: str, name: str, entry: Mapping[str, Any], data_start: int) -> TensorInfo:
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
        raise _malformed(uri, f"its header's entry of tensor {name} is not a type, a shape and two offsets")
    if dtype not in _DTYPES:
        raise WeightsError(
            f"{uri}: tensor {name}: type not supported: must be one of {', '.join(_DTYPES)} (got {dtype!r}). "
            "Convert the weights to bf16."
        )
    return TensorInfo(_DTYPES[dtype], tuple(shape), data_start + offsets[0], data_start + offsets[1])


def _are_sizes(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(size) is int and size >= 0 for size in value)


def _malformed(uri: str, why: str) -> WeightsError:
    return WeightsError(f"{uri} is not a complete safetensors file: {why}. Copy or export it again.")


def _truncated(uri: str, name: str, info: TensorInfo, size: int) -> WeightsError:
    return WeightsError(
        f"{uri} is truncated: tensor {name} should end at byte {info.stop} and the file has {size}. "
        "Copy or export it again."
    )


def write_file(uri: str, tensors: Mapping[str, Tensor], hasher: Hasher | None = None) -> int:
    """Size in bytes of the file that `tensors` were written to, atomically.

    A local file is written tensor by tensor, with no copy of its data in memory; a remote one is joined in memory. Not
    by `safetensors.torch.save_file`, whose order of tensors this keeps: that overwrites its target in place, neither
    syncs it to the disk nor knows URIs, and its error of a full disk carries no errno.

    Args:
        hasher: is updated with every byte of the file, in order.

    Raises:
        DiskFullError, StorageError: the file could not be written; nothing is left at `uri` then.
    """
    header, ordered = _header(tensors)
    if not storage.is_local(uri):
        data = b"".join([header, *(_bytes(tensor) for tensor in ordered)])
        if hasher is not None:
            hasher.update(data)
        storage.write_bytes(uri, data)
        return len(data)
    path = storage.local_path(uri)
    temporary = f"{path}.{os.getpid()}.{threading.get_ident()}.tmp"
    with storage_errors(uri):
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        try:
            size = _write(temporary, header, ordered, hasher)
            os.replace(temporary, path)
        except BaseException:
            if os.path.exists(temporary):
                os.unlink(temporary)
            raise
    return size


def _write(path: str, header: bytes, ordered: list[Tensor], hasher: Hasher | None) -> int:
    """Bytes written to `path` and synced to the disk."""
    with open(path, "wb", buffering=0) as handle:
        for part in itertools.chain([memoryview(header)], map(_bytes, ordered)):
            for start in range(0, len(part), _WRITE_BYTES):
                block = part[start : start + _WRITE_BYTES]
                if hasher is not None:  # while the block is in the processor's cache
                    hasher.update(block)
                while block:
                    block = block[handle.write(block) :]
        os.fsync(handle.fileno())
        return handle.tell()


def _header(tensors: Mapping[str, Tensor]) -> tuple[bytes, list[Tensor]]:
    """The file's bytes before the data, and the tensors in the data's order: by alignment, then by name."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    ordered, offset = [], 0
    types = {dtype: (place, kind) for place, (kind, dtype) in enumerate(_DTYPES.items())}
    for name, tensor in sorted(tensors.items(), key=lambda item: (types[item[1].dtype], item[0])):
        end = offset + tensor.numel() * tensor.itemsize
        kind = types[tensor.dtype][1]
        entries[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [offset, end]}
        ordered.append(tensor)
        offset = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, ordered


def _bytes(tensor: Tensor) -> memoryview:
    """The data of a tensor, without a copy where it is dense and on the CPU."""
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return flat.numpy().data
