"""Results of one layer on disk: int4 words, scales and changed plain weights, in parts, with a marker written last.

Shapes: O output channel, I input channel, G group, W 32-bit word of eight values.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict

from torch import Tensor

from base import storage
from model.calibration.expert_rows import ExpertCoverage
from model.calibration.int4_weight import Int4Weight
from model.numerics.int4_groups import pack, unpack
from model.weights.safetensors_file import SafetensorsFile, write_file

Result = Int4Weight | Tensor
"""A rounded weight, or a plain one that AWQ changed."""

# A part is written as soon as it holds this much, so that a layer of 11 B weights is never in memory as a whole.
_PART_BYTES = 256 << 20
_WORDS, _SCALE = ".int4_words", ".int4_scale"


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


def read_results(directory: str) -> Iterator[tuple[str, Result]]:
    """Results of a layer by released name, one in memory at a time.

    Raises:
        MissingFileError: the layer was never finished.
    """
    record = storage.read_commit(directory)
    files = [SafetensorsFile(storage.join(directory, part)) for part in record["parts"]]
    file_of = {name: file for file in files for name in file.tensors}
    for stored, file in file_of.items():
        if stored.endswith(_SCALE):
            continue
        name = stored.removesuffix(_WORDS)
        if name not in record["int4"]:
            yield name, file.read(name)
            continue
        columns, group = record["int4"][name]
        scale_OG = file_of[name + _SCALE].read(name + _SCALE)
        yield name, Int4Weight(unpack(file.read(stored), columns), scale_OG, group)


def read_coverage(directory: str) -> list[ExpertCoverage]:
    """What each expert of a layer was calibrated with; empty for a dense layer.

    Raises:
        MissingFileError: the layer was never finished.
    """
    return [ExpertCoverage(**expert) for expert in storage.read_commit(directory)["experts"]]
