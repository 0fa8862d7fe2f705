"""Weights reader: tensors of a safetensors folder by released name, in full or sliced, fp8 blocks dequantized."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import torch
from torch import Tensor

from base import storage
from base.errors import MissingFileError, WeightsError
from model.numerics.e4m3 import DTYPE as FP8
from model.numerics.fp8_blocks import BLOCK, SCALE_SUFFIX, dequantize_blocks, scale_shape
from model.weights.safetensors_file import Box, SafetensorsFile, TensorInfo, open_store, whole_box

INDEX_NAME = "model.safetensors.index.json"
_SINGLE_NAME = "model.safetensors"
_OPENING_THREADS = 16


class Source(Protocol):
    """Tensors under their released names, readable in slices."""

    uri: str

    @property
    def names(self) -> list[str]:
        """Names of all tensors."""

    def __contains__(self, name: str) -> bool: ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one tensor."""

    def dtype(self, name: str) -> torch.dtype:
        """Stored type of one tensor."""

    def read_box(self, name: str, box: Box) -> Tensor:
        """Slice of one tensor on the CPU, as it is stored."""

    def open_files(self) -> None:
        """Open everything ahead of the reads; a damaged file raises later, for each of its tensors."""

    def remote_file(self, name: str) -> SafetensorsFile | None:
        """Remote file of a tensor, whose neighbouring byte ranges are worth one request; `None` for direct access."""


def is_scale(source: Source, name: str) -> bool:
    """Whether a tensor is the block scales of an fp8 tensor that is there too."""
    return name.endswith(SCALE_SUFFIX) and name.removesuffix(SCALE_SUFFIX) in source


def scale_problem(source: Source, name: str) -> str | None:
    """Description of a mismatch in the block scales of a tensor; `None` when they fit, or it is not fp8."""
    if source.dtype(name) != FP8:
        return None
    shape, scale_name = source.shape(name), name + SCALE_SUFFIX
    found = list(source.shape(scale_name)) if scale_name in source else "none"
    needed = list(scale_shape(shape)) if len(shape) == 2 else "two dimensions"
    if found == needed:
        if (stored := source.dtype(scale_name)).is_floating_point:
            return None
        return f"{scale_name}, the scales of an fp8 tensor, must be floats (got {stored})"
    return f"fp8 tensor {name} of shape {list(shape)} needs {scale_name} of shape {needed} (got {found})"


def scale_box(box: Box) -> Box:
    """Slice of the scales that covers the slice `box` of an fp8 weight; blocks at its borders may be partial."""
    return tuple((first // BLOCK, -(-last // BLOCK)) for first, last in box)


def dequantize_box(values_OI: Tensor, scale: Tensor, box: Box) -> Tensor:
    """fp32 values of the slice `box` of an fp8 weight; `scale` is the slice of its scales from `scale_box`."""
    return dequantize_blocks(values_OI, scale, row=box[0][0] % BLOCK, column=box[1][0] % BLOCK)


def read_weight_box(source: Source, name: str, box: Box) -> Tensor:
    """Slice of one weight on the CPU, fp8 dequantized to fp32. Copy before writing to it."""
    values = source.read_box(name, box)
    if values.dtype != FP8:
        return values
    return dequantize_box(values, source.read_box(name + SCALE_SUFFIX, scale_box(box)), box)


class WeightsReader:
    """Tensors of one folder over all its files. Files are opened on first use.

    Raises:
        MissingFileError: the folder has neither an index nor a model.safetensors.
        WeightsError: the index cannot be read.
    """

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self._files: dict[str, SafetensorsFile] = {}
        self._damaged: dict[str, WeightsError] = {}
        self._store = open_store(uri)
        self._file_of = self._read_index()

    def _read_index(self) -> dict[str, str]:
        index = storage.join(self.uri, INDEX_NAME)
        if storage.exists(index):
            try:
                weight_map = storage.read_json(index)["weight_map"]
                return {str(name): str(file) for name, file in weight_map.items()}
            except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
                raise WeightsError(f"{index} is no safetensors index: {error}. Copy or export it again.") from error
        if storage.exists(storage.join(self.uri, _SINGLE_NAME)):
            return dict.fromkeys(self.file(_SINGLE_NAME).tensors, _SINGLE_NAME)
        raise MissingFileError(
            f"{self.uri} holds no weights: neither {INDEX_NAME} nor {_SINGLE_NAME} is there. "
            "Name a folder in Hugging Face's layout."
        )

    @property
    def names(self) -> list[str]:
        """Released names of all tensors, in the index's order."""
        return list(self._file_of)

    @property
    def files(self) -> list[str]:
        """File names, sorted."""
        return sorted(set(self._file_of.values()))

    def names_in(self, file: str) -> list[str]:
        """Names of the tensors in one file."""
        return [name for name, holder in self._file_of.items() if holder == file]

    def file(self, name: str) -> SafetensorsFile:
        """One open file of the folder. A damaged one is read once, and raises for each of its tensors."""
        if name in self._damaged:
            raise self._damaged[name]
        if name not in self._files:
            uri = storage.join(self.uri, name)
            try:
                self._files[name] = SafetensorsFile(uri, self._store)
            except MissingFileError as error:
                self._damaged[name] = WeightsError(f"{uri} does not exist, but {INDEX_NAME} names it. Copy it again.")
                raise self._damaged[name] from error
            except WeightsError as error:
                self._damaged[name] = error
                raise
        return self._files[name]

    def file_of(self, name: str) -> SafetensorsFile:
        """Open file that holds one tensor."""
        return self.file(self._file_of[name])

    def open_files(self) -> None:
        """Open the files of an object store concurrently, for each costs three round trips; local ones open on use."""
        if storage.is_local(self.uri):
            return
        with ThreadPoolExecutor(_OPENING_THREADS) as pool:
            for opened in [pool.submit(self.file, name) for name in self.files]:
                if not isinstance(opened.exception(), WeightsError | None):
                    opened.result()

    def remote_file(self, name: str) -> SafetensorsFile | None:
        """Open file of one tensor in an object store; `None` for a local folder, whose files are memory-mapped."""
        file = self.file_of(name)
        return None if file.is_local else file

    def close(self, file: str) -> None:
        """Close a file, so that its mapped pages can be freed."""
        self._files.pop(file, None)

    def info(self, name: str) -> TensorInfo:
        """Type and shape of one tensor.

        Raises:
            WeightsError: no such tensor, or the index is wrong about its file; or see `SafetensorsFile`.
        """
        if name not in self._file_of:
            raise WeightsError(f"{self.uri} has no tensor {name}")
        file = self.file(self._file_of[name])
        if name not in file.tensors:
            raise WeightsError(f"{file.uri} has no tensor {name}, but {INDEX_NAME} lists it. Export the folder again.")
        return file.tensors[name]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one tensor; see `info`."""
        return self.info(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """Stored type of one tensor; see `info`."""
        return self.info(name).dtype

    def read(self, name: str) -> Tensor:
        """One tensor on the CPU, in the file's type; see `info`. Copy before writing to it."""
        return self.read_box(name, whole_box(self.shape(name)))

    def read_box(self, name: str, box: Box) -> Tensor:
        """Slice of one tensor on the CPU, in the file's type. Copy before writing to it."""
        self.info(name)
        return self.file_of(name).read_box(name, box)

    def read_weight(self, name: str) -> Tensor:
        """One weight on the CPU, fp8 dequantized to fp32 by its block scales. Copy before writing to it.

        Raises:
            WeightsError: an fp8 tensor without scales of the right shape.
        """
        if (problem := scale_problem(self, name)) is not None:
            raise WeightsError(f"{self.uri}: {problem}. Copy the folder again.")
        return read_weight_box(self, name, whole_box(self.shape(name)))

    def is_scale(self, name: str) -> bool:
        """Whether a tensor is the block scales of an fp8 tensor that is there too."""
        return is_scale(self, name)

    def __contains__(self, name: str) -> bool:
        return name in self._file_of
