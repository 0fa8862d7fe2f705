"""Owns reading and writing one safetensors file by URI: its header, its checks, and tensors or parts of them.

It knows nothing of models. Local files are memory-mapped; of others exactly the bytes that are asked for are read.
Format: 8 bytes little-endian header length, JSON header, then the tensors' bytes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import safetensors
import torch
from fsspec.core import url_to_fs
from torch import Tensor

from base import storage
from base.errors import WeightsError, storage_errors

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
# The format's own limit on a header; a larger number is not a header.
_MAX_HEADER_BYTES = 100_000_000


class TensorInfo(NamedTuple):
    """One tensor of a file, as the header describes it."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    """First byte, from the start of the file."""
    stop: int


Box = tuple[tuple[int, int], ...]
"""A part of a tensor: the first and one past the last index of each dimension."""


def whole_box(shape: tuple[int, ...]) -> Box:
    """The box that is all of a tensor."""
    return tuple((0, size) for size in shape)


class SafetensorsFile:
    """One open file. The header is read and checked against the file's size on construction.

    Args:
        store: the fsspec file system of `uri`, for callers that open many files of one: fsspec makes another one, with
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
        """A part of a tensor; like `read`. Of a local file only the pages that are then touched are read."""
        if self.is_local:
            if self._mapped is None:
                self._mapped = _map(self.uri)
            tensor: Tensor = self._mapped.get_tensor(name)
            return tensor[tuple(slice(*bounds) for bounds in box)]
        start, stop = self.span(name, box)
        return self.cut(name, box, self.read_range(start, stop), start)

    def span(self, name: str, box: Box) -> tuple[int, int]:
        """First and one past the last byte of a part, from the start of the file.

        Rows lie together. A range of columns spans what is between: one request instead of one a row.
        """
        info = self.tensors[name]
        if any(first >= last for first, last in box):
            return info.start, info.start
        strides = _strides(info.shape)
        first = sum(bounds[0] * stride for bounds, stride in zip(box, strides, strict=True))
        last = sum((bounds[1] - 1) * stride for bounds, stride in zip(box, strides, strict=True))
        return info.start + first * info.dtype.itemsize, info.start + (last + 1) * info.dtype.itemsize

    def cut(self, name: str, box: Box, data: bytearray, data_start: int) -> Tensor:
        """A part of a tensor out of bytes of the file that begin at `data_start` and hold its span; a view of them.

        Raises:
            WeightsError: they end before it does: the file was cut short after it was opened.
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
        """Bytes of the file, by any thread; fewer if it ends before."""
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
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise _malformed(uri, f"its header cannot be read ({type(error).__name__}: {error})") from error
        for name, info in sorted(tensors.items(), key=lambda item: item[1].stop):
            if info.stop - info.start != math.prod(info.shape) * info.dtype.itemsize:
                raise _malformed(uri, f"tensor {name} of shape {list(info.shape)} has {info.stop - info.start} bytes")
            if info.stop > size:
                raise _truncated(uri, name, info, size)
        return tensors


def open_store(uri: str) -> Any:
    """The fsspec file system of `uri`; it keeps no listings, for another host may have written since."""
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
    if entry["dtype"] not in _DTYPES:
        raise WeightsError(
            f"{uri}: tensor {name}: type not supported: must be one of {', '.join(_DTYPES)} (got {entry['dtype']!r}). "
            "Convert the weights to bf16."
        )
    start, stop = entry["data_offsets"]
    return TensorInfo(_DTYPES[entry["dtype"]], tuple(entry["shape"]), data_start + start, data_start + stop)


def _malformed(uri: str, why: str) -> WeightsError:
    return WeightsError(f"{uri} is not a whole safetensors file: {why}. Copy or export it again.")


def _truncated(uri: str, name: str, info: TensorInfo, size: int) -> WeightsError:
    return WeightsError(
        f"{uri} is truncated: tensor {name} should end at byte {info.stop} and the file has {size}. "
        "Copy or export it again."
    )


def write_file(uri: str, tensors: Mapping[str, Tensor]) -> int:
    """Write `tensors` as one file and return its bytes. The data of all of them is in memory meanwhile.

    Raises:
        DiskFullError, StorageError: the file could not be written; nothing is left at `uri` then.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data, offset = [], 0
    for name, tensor in tensors.items():
        raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        stop = offset + len(raw)
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, stop]}
        data.append(raw)
        offset = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    # Padded so that the data begins at a multiple of 8 bytes, as the reference writer does.
    text += b" " * (-len(text) % 8)
    whole = b"".join([len(text).to_bytes(8, "little"), text, *data])
    storage.write_bytes(uri, whole)
    return len(whole)
