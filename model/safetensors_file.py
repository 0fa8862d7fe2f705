"""Owns reading and writing one safetensors file by URI: its header, its checks, and single tensors.

It knows nothing of models. Local files are memory-mapped; others are read by byte range.
Format: 8 bytes little-endian header length, JSON header, then the tensors' bytes.
"""

from __future__ import annotations

import json
import math
import os
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


class SafetensorsFile:
    """One open file. The header is read and checked against the file's size on construction.

    Raises:
        MissingFileError: nothing at `uri`.
        WeightsError: truncated or malformed; names the file and, where it can, the tensor.
    """

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self.tensors = _read_header(uri)
        self._mapped: Any = None

    def read(self, name: str) -> Tensor:
        """One tensor on the CPU. Of a local file it is a view of the mapped pages: copy before writing to it."""
        info = self.tensors[name]
        if storage.is_local(self.uri):
            if self._mapped is None:
                self._mapped = _map(self.uri)
            tensor: Tensor = self._mapped.get_tensor(name)
            return tensor
        fs, path = url_to_fs(self.uri)
        with storage_errors(self.uri):
            data = bytearray(fs.cat_file(path, start=info.start, end=info.stop))
        if len(data) != info.stop - info.start:
            raise _truncated(self.uri, name, info, info.start + len(data))
        if not data:
            return torch.empty(info.shape, dtype=info.dtype)
        return torch.frombuffer(data, dtype=info.dtype).view(info.shape)


def _map(uri: str) -> Any:
    try:
        return safetensors.safe_open(storage.local_path(uri), framework="pt")
    except safetensors.SafetensorError as error:
        raise _malformed(uri, str(error)) from error


def _read_header(uri: str) -> dict[str, TensorInfo]:
    with storage.open_read(uri) as handle:
        size = handle.seek(0, os.SEEK_END)
        handle.seek(0)
        length = int.from_bytes(handle.read(8), "little")
        if size < 8 or length > _MAX_HEADER_BYTES:
            raise _malformed(uri, f"it has {size} bytes and its first 8 are no header length")
        if size < 8 + length:
            raise _malformed(uri, f"its header should be {length} bytes long and the file has {size}: it is truncated")
        text = handle.read(length)
    try:
        raw = json.loads(text)
        raw.pop("__metadata__", None)
        tensors = {name: _parse(entry, 8 + length) for name, entry in raw.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _malformed(uri, f"its header cannot be read ({type(error).__name__}: {error})") from error
    for name, info in sorted(tensors.items(), key=lambda item: item[1].stop):
        if info.stop - info.start != math.prod(info.shape) * info.dtype.itemsize:
            raise _malformed(uri, f"tensor {name} of shape {list(info.shape)} has {info.stop - info.start} bytes")
        if info.stop > size:
            raise _truncated(uri, name, info, size)
    return tensors


def _parse(entry: Mapping[str, Any], data_start: int) -> TensorInfo:
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
