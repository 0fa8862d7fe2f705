"""Results of one layer on disk: int4 words, scales and changed plain weights, in parts, with a marker written last.

Shapes: O output channel, I input channel, G group, W 32-bit word of eight values.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from base import storage
from model.calibration.expert_rows import ExpertCoverage
from model.calibration.int4_weight import Int4Weight
from model.numerics.int4_groups import pack, unpack
from model.numerics.weight_kinds import layer_of
from model.weights.safetensors_file import SafetensorsFile, write_file

Result = Int4Weight | Tensor
"""A rounded weight, or a plain one that AWQ changed."""

# A part is written as soon as it holds this much, so that a layer of 11 B weights is never in memory as a whole.
_PART_BYTES = 256 << 20
_WORDS, _SCALE, _ROW_FACTOR, _COLUMN_FACTOR = ".int4_words", ".int4_scale", ".row_factor", ".column_factor"


def layer_directory(work_directory: Path, number: int) -> str:
    """Directory of a layer's results."""
    return str(work_directory / f"layer-{number:05}")


class LayerWriter:
    """Writes one layer's results to a directory, which it empties first."""

    def __init__(self, directory: str) -> None:
        storage.remove_tree(directory)
        storage.make_directory(directory)
        self._directory = directory
        self._waiting: dict[str, Tensor] = {}
        self._bytes = 0
        self._parts: list[str] = []
        self._int4: dict[str, list[int]] = {}

    def keep(self, name: str, result: Result) -> None:
        """Add one weight under its released name."""
        if isinstance(result, Int4Weight):
            self._int4[name] = [result.values_OI.shape[1], result.group]
            self._add(name + _WORDS, pack(result.values_OI).cpu())
            self._add(name + _SCALE, result.scale_OG.cpu().contiguous())
            for suffix, factor in ((_ROW_FACTOR, result.row_factor_O), (_COLUMN_FACTOR, result.column_factor_I)):
                if factor is not None:
                    self._add(name + suffix, factor.detach().cpu().clone())
        else:
            self._add(name, result.detach().cpu().clone())

    def _add(self, name: str, tensor: Tensor) -> None:
        self._waiting[name] = tensor
        self._bytes += tensor.numel() * tensor.itemsize
        if self._bytes >= _PART_BYTES:
            self._write()

    def _write(self) -> None:
        if self._waiting:
            self._parts.append(f"part-{len(self._parts):05}.safetensors")
            write_file(storage.join(self._directory, self._parts[-1]), self._waiting)
            self._waiting, self._bytes = {}, 0

    def commit(self, coverage: Sequence[ExpertCoverage]) -> None:
        """Write what is left, and the marker."""
        self._write()
        experts = [asdict(expert) for expert in coverage]
        storage.commit(self._directory, {"parts": self._parts, "int4": self._int4, "experts": experts})


class Factors(NamedTuple):
    """What AWQ multiplied a weight's rows [O] and columns [I] by before they were rounded; `None` is 1."""

    row_O: Tensor | None
    column_I: Tensor | None


class LayerResults:
    """Results of one layer by released name; its files stay open.

    Raises:
        MissingFileError: the layer was never finished.
    """

    def __init__(self, directory: str) -> None:
        record = storage.read_commit(directory)
        self.int4: dict[str, list[int]] = record["int4"]
        """Input channels and group size of each int4 weight."""
        files = [SafetensorsFile(storage.join(directory, part)) for part in record["parts"]]
        self._file_of = {name: file for file in files for name in file.tensors}
        beside = (_SCALE, _ROW_FACTOR, _COLUMN_FACTOR)
        self.names = [stored.removesuffix(_WORDS) for stored in self._file_of if not stored.endswith(beside)]
        self._known = set(self.names)

    def read(self, name: str) -> Result | None:
        """Result of one weight; `None` where calibration left it as it was."""
        if name not in self._known:
            return None
        if name not in self.int4:
            return self._read(name)
        columns, group = self.int4[name]
        values_OI = unpack(self._read(name + _WORDS), columns)
        return Int4Weight(values_OI, self._read(name + _SCALE), group, *self.factors(name))

    def factors(self, name: str) -> Factors:
        """Factors of one int4 weight."""
        stored = (name + suffix for suffix in (_ROW_FACTOR, _COLUMN_FACTOR))
        return Factors(*(self._read(key) if key in self._file_of else None for key in stored))

    def _read(self, stored: str) -> Tensor:
        return self._file_of[stored].read(stored)


class CalibrationResults:
    """Results of a work directory by released name; the files of one layer are open at a time."""

    def __init__(self, work_directory: Path) -> None:
        self._directory = work_directory
        self._open: tuple[int, LayerResults | None] | None = None

    def of(self, name: str) -> LayerResults | None:
        """Results of the layer that a weight is in; `None` for one of no layer, or of one that was not calibrated."""
        number = layer_of(name)
        if number is None:
            return None
        if self._open is None or self._open[0] != number:
            directory = layer_directory(self._directory, number)
            self._open = number, LayerResults(directory) if storage.is_committed(directory) else None
        return self._open[1]


def read_results(directories: Iterable[str]) -> Iterator[tuple[str, Result]]:
    """Results of layers by released name, one in memory at a time: rounded weights, with AWQ also those it changed.

    Raises:
        MissingFileError: a layer was never finished.
    """
    for directory in directories:
        results = LayerResults(directory)
        for name in results.names:
            if (result := results.read(name)) is not None:
                yield name, result


def read_coverage(directory: str) -> list[ExpertCoverage]:
    """What each expert of a layer was calibrated with; empty for a dense layer.

    Raises:
        MissingFileError: the layer was never finished.
    """
    return [ExpertCoverage(**expert) for expert in storage.read_commit(directory)["experts"]]
