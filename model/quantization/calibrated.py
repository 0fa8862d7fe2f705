"""Quantization whose int4 weights are calibrated: how it is done, and a format that takes what calibration found.

Results lie in a work directory, from which every worker reads them. A local target's is beside it, TARGET.calibration:
it needs half a byte a weight and the hidden states (model/calibration/runner.py). A remote target's is in the directory
of temporary files (TMPDIR), under a name from the target's URI, so that the same command on the same machine goes on.

Shapes: O output channel, I input channel.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from base import storage
from base.errors import ConfigError
from base.storage import Progress
from model.calibration.int4_weight import Int4Weight
from model.calibration.method import named
from model.calibration.names import misfit
from model.calibration.results import CalibrationResults
from model.calibration.runner import (
    IDENTITY_NAME,
    calibrated_layers,
    calibration_identity,
    coverage_of,
    discard,
)
from model.numerics.formats import QuantizationFormat, Restore
from model.numerics.int4_groups import Int4Groups
from model.numerics.scheme_format import SchemeFormat
from model.quantization.coverage import describe_coverage
from model.weights.reader import WeightsReader


@dataclass(frozen=True)
class Calibration:
    """What int4 weights are calibrated with."""

    method: str
    """One of `model.calibration.names.CALIBRATED`."""
    documents: Sequence[Tensor]
    """int64 tokens [T] of each calibration document."""


class Calibrating:
    """Calibration of one folder's int4 weights, in a work directory that belongs to the target.

    Args:
        quantization: the format that is written, one that `check_method` lets through.
    """

    def __init__(
        self, source_uri: str, target_uri: str, calibration: Calibration, quantization: QuantizationFormat
    ) -> None:
        assert isinstance(quantization, SchemeFormat), "int4 groups are one of its schemes"
        # As `describe_origin` has it: the same from every working directory.
        is_local = storage.is_local(source_uri)
        self._source_uri = os.path.abspath(storage.local_path(source_uri)) if is_local else source_uri
        self._calibration, self._format = calibration, quantization
        self.work_directory = work_directory(target_uri)
        groups = {group for name in WeightsReader(source_uri).names if (group := self._group(name)) is not None}
        # A model without routed experts has none; its folder is then as any other.
        self._method = named(calibration.method, min(groups, default=128))

    def _group(self, name: str) -> int | None:
        scheme = self._format.scheme(name)
        return scheme.group if isinstance(scheme, Int4Groups) else None

    def _wanted(self, name: str) -> bool:
        return self._group(name) is not None

    def identity(self) -> dict[str, Any]:
        """What the results depend on beside the source, for `describe_origin`."""
        found = calibration_identity(self._source_uri, self._calibration.documents, self._method, wanted=self._wanted)
        settings = storage.fingerprint([found["method"], found["dtype"]])
        return {
            "method": [self._calibration.method, settings],
            "tokens": found["tokens"],
            "calibration_code": found["code"],
        }

    def run(self, on_progress: Progress | None) -> CalibratedFormat:
        """The format with what calibration found; what an earlier call left is gone on with.

        Raises:
            InvalidInputError: there is no calibration token, or one that the model has no embedding for.
            DiskFullError, StorageError: a result could not be written.
        """
        layers = calibrated_layers(
            self._source_uri,
            self._calibration.documents,
            self.work_directory,
            self._method,
            wanted=self._wanted,
            device="cuda" if torch.cuda.is_available() else "cpu",
            on_progress=on_progress,
        )
        for _ in layers:
            pass
        return CalibratedFormat(self._format, self.work_directory)

    def report(self) -> dict[str, Any]:
        """Calibration's part of the report: settings, tokens, and what each expert saw; see `describe_coverage`."""
        documents = self._calibration.documents
        settings = {key: value for key, value in asdict(self._method).items() if key != "scale_dtype"}
        about = {"method": self._calibration.method, "settings": settings}
        counts = {"documents": len(documents), "tokens": sum(map(len, documents))}
        return about | counts | describe_coverage(coverage_of(self.work_directory))


class CalibratedFormat:
    """A format whose int4 weights are those of a calibration; the rest is quantized as the format does it."""

    def __init__(self, plain: QuantizationFormat, work_directory: Path) -> None:
        self._plain, self._results = plain, CalibrationResults(work_directory)
        self.work_directory = work_directory
        self.entries = plain.entries
        self.quantization_config = plain.quantization_config

    def changed(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The weights, those that AWQ changed (norms, the router, shared experts) as they are now, in their type."""
        return {name: self._changed(name, weight) for name, weight in weights.items()}

    def _changed(self, name: str, weight: Tensor) -> Tensor:
        layer = self._results.of(name)
        found = None if layer is None or name in layer.int4 else layer.read(name)
        return found.to(weight.dtype) if isinstance(found, Tensor) else weight

    def group(self, hf_name: str) -> str | None:
        """As the format has it."""
        return self._plain.group(hf_name)

    def quantize(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Stored tensors: calibration's values and scales, for a weight that it rounded."""
        if len(weights) == 1:
            [name] = weights
            layer = self._results.of(name)
            found = None if layer is None else layer.read(name)
            if isinstance(found, Int4Weight):
                scheme = Int4Groups(found.group)
                return {
                    name + suffix: tensor for suffix, tensor in scheme.store(found.values_OI, found.scale_OG).items()
                }
        return self._plain.quantize(weights)

    def restorers(self, stored: Mapping[str, Tensor]) -> dict[str, Restore]:
        """Functions of the weights as the source has them: without the factors that AWQ put into other weights."""
        return {name: self._restorer(name, plain) for name, plain in self._plain.restorers(stored).items()}

    def _restorer(self, name: str, plain: Restore) -> Restore:
        layer = self._results.of(name)
        if layer is None or name not in layer.int4:
            return plain
        row_O, column_I = layer.factors(name)
        if row_O is None and column_I is None:
            return plain

        def restore(rows: slice, out: Tensor) -> None:
            plain(rows, out)
            if row_O is not None:
                out.div_(row_O[rows, None])
            if column_I is not None:
                out.div_(column_I)

        return restore

    def replacement(self, hf_name: str, module: nn.Module, dtype: torch.dtype) -> nn.Module | None:
        """As the format has it."""
        return self._plain.replacement(hf_name, module, dtype)


def check_method(method: str, format_name: str) -> None:
    """Refuse a method that does not go together with a format.

    Raises:
        ConfigError: the format has no int4 weights in groups.
    """
    if (rule := misfit(method, format_name)) is not None:
        raise ConfigError(f"quantization method {method}: {rule}")


def discard_work(target_uri: str) -> None:
    """Remove the work directory of a target that is finished, whatever method left one."""
    directory = work_directory(target_uri)
    if (directory / IDENTITY_NAME).exists():
        discard(directory)


def work_directory(target_uri: str) -> Path:
    """Directory of a target's calibration, which is there until the target is committed."""
    if storage.is_local(target_uri):
        return Path(os.path.abspath(storage.local_path(target_uri)) + ".calibration")
    return Path(tempfile.gettempdir()) / f"cherry-{storage.fingerprint(target_uri)[:16]}.calibration"
