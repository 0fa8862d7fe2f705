"""Calibration of a weights folder, block by block: what is in memory does not grow with the number of layers.

The documents' hidden states go through the model once; each block is rounded on the hidden states that the rounded
blocks before it give, as in GPTQ's code (arXiv 2210.17323, section 4). For the 671B model and 128 x 2,048 calibration
tokens that takes, beside one expert's weights: a block without routed experts (0.5 GB in bf16, 1.2 GB a dense one), the
moments of one stage in fp32 and, for GPTQ, five matrices of their size in fp64 (0.2 + 2 GB for an expert's 7,168 input
channels, 1.1 + 11 GB for o_proj's 16,384, 2.7 + 14 GB for the down_proj of a dense layer), and three mapped files of
3.8 GB, of which the system keeps in memory what it has room for.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from base import storage
from base.errors import InvalidInputError
from base.storage import Progress
from model.calibration.block import BlockCalibration, BlockRows, Settings
from model.calibration.expert_rows import ExpertCoverage
from model.calibration.layer import Layer
from model.calibration.method import Method
from model.calibration.results import LayerWriter, Result, read_coverage, read_results
from model.calibration.token_rows import batches_of, map_rows, sync
from model.model_config import ModelConfig
from model.numerics.formats import is_projection
from model.transformer import next_tokens
from model.weights.pretrained import WeightsReader, read_model_config

_IDENTITY, _MIDDLE, _MIXED = "calibration.json", "middle.bin", "mtp.bin"
# What is removed from a work directory; anything else there is not ours.
_OWN = (_IDENTITY, "layer-*", "hidden-*.bin", _MIDDLE, _MIXED)


def calibrated(
    source_uri: str,
    documents: Sequence[Tensor],
    work_directory: Path,
    method: Method,
    *,
    wanted: Callable[[str], bool] = is_projection,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    on_progress: Progress | None = None,
) -> Iterator[tuple[str, Result]]:
    """Rounded weights by released name, layer after layer; with AWQ also the plain weights that it changed.

    A layer's results are in `work_directory` once it is done; called again with the same arguments, it goes on with
    the layer after the last one that is there.

    Args:
        documents: int64 tokens [T] of each calibration document.
        wanted: which weights are rounded, by released name; projections at most.
        dtype: type of activations and of the weights while they are computed with.

    Raises:
        InvalidInputError: there is no calibration token, or one that the model has no embedding for.
        MissingFileError, WeightsError, ConfigError: the source cannot be read.
        DiskFullError, StorageError: a result could not be written.
    """
    config, _ = read_model_config(source_uri)
    documents = [document for document in documents if document.numel()]
    _check(documents, config)
    work = _Work(work_directory, sum(map(len, documents)), config, dtype)
    reader = WeightsReader(source_uri)
    names = [name for name in reader.names if wanted(name)]
    work.begin(_identity(source_uri, documents, method, names, dtype))
    settings = Settings(method, wanted, dtype, torch.device(device))
    layers = config.num_hidden_layers + config.num_nextn_predict_layers
    for number in range(layers):
        if not storage.is_committed(work.results(number)):
            _calibrate(reader, Layer(number, config), documents, work, settings)
        if on_progress is not None:
            on_progress(f"calibrated layer {number + 1}/{layers}", (number + 1) / layers)
        yield from read_results(work.results(number))


def coverage_of(work_directory: Path) -> list[ExpertCoverage]:
    """What each routed expert was calibrated with, of the layers that are done."""
    layers = sorted(path for path in work_directory.glob("layer-*") if storage.is_committed(str(path)))
    return [expert for path in layers for expert in read_coverage(str(path))]


def _check(documents: Sequence[Tensor], config: ModelConfig) -> None:
    if not documents:
        raise InvalidInputError("the calibration set has no token: give documents with text")
    highest, lowest = (int(ends) for ends in (max(map(torch.max, documents)), min(map(torch.min, documents))))
    if lowest < 0 or highest >= config.vocab_size:
        raise InvalidInputError(
            f"calibration tokens must be 0 to {config.vocab_size - 1}, the model's vocabulary (got {lowest} to "
            f"{highest}). Encode the documents with the model's own tokenizer."
        )


def _identity(
    source_uri: str, documents: Sequence[Tensor], method: Method, names: list[str], dtype: torch.dtype
) -> dict[str, Any]:
    """What results depend on; those of another identity are not gone on with."""
    hasher = hashlib.sha256()
    for document in documents:
        hasher.update(f"{len(document)}:".encode())
        hasher.update(document.contiguous().numpy().tobytes())
    settings = {key: str(value) for key, value in asdict(method).items()}
    source = {"uri": source_uri, "files": storage.stored_files(source_uri)}
    return {
        "source": storage.fingerprint(source),
        "tokens": hasher.hexdigest(),
        "method": settings,
        "weights": storage.fingerprint(names),
        "dtype": str(dtype),
    }


class _Work:
    """The work directory: results by layer, and the hidden states before the layer that is next."""

    def __init__(self, directory: Path, rows: int, config: ModelConfig, dtype: torch.dtype) -> None:
        self.directory, self._shape, self._dtype = directory, (rows, config.hidden_size), dtype

    def begin(self, identity: dict[str, Any]) -> None:
        """Keep results of the same identity, and remove any others."""
        path = str(self.directory / _IDENTITY)
        if not storage.exists(path) or storage.read_json(path) != identity or not self._can_resume():
            for pattern in _OWN:
                for own in self.directory.glob(pattern):
                    storage.remove_tree(str(own))
            storage.write_json(path, identity)

    def _can_resume(self) -> bool:
        done = len([path for path in self.directory.glob("layer-*") if storage.is_committed(str(path))])
        path, size = self.hidden(done), math.prod(self._shape) * self._dtype.itemsize
        return not done or (path.exists() and path.stat().st_size == size)

    def results(self, number: int) -> str:
        """Directory of a layer's results."""
        return str(self.directory / f"layer-{number:05}")

    def hidden(self, number: int) -> Path:
        """File of the hidden states before a layer; those after the last one are there as well."""
        return self.directory / f"hidden-{number:05}.bin"

    def rows(self, path: Path) -> Tensor:
        """Mapped rows of one file."""
        return map_rows(path, self._shape, self._dtype)


def _calibrate(
    reader: WeightsReader, layer: Layer, documents: Sequence[Tensor], work: _Work, settings: Settings
) -> None:
    before = work.hidden(layer.number)
    if layer.number == 0:
        _embed(reader, documents, work.rows(before))
    source_ND, mixed = work.rows(before), work.directory / _MIXED
    if layer.is_mtp:
        source_ND = work.rows(mixed)
        _mix(reader, layer, documents, work.rows(before), source_ND, settings)
    after, middle = work.hidden(layer.number + 1), work.directory / _MIDDLE
    rows = BlockRows(source_ND, work.rows(middle), work.rows(after))
    writer = LayerWriter(work.results(layer.number))
    block = BlockCalibration(reader, layer, rows, list(batches_of(documents)), settings)
    coverage = block.run(writer.keep)
    sync(after)
    writer.commit(coverage)
    for path in (before, middle, mixed):
        path.unlink(missing_ok=True)
    for file in reader.files:
        reader.close(file)


def _embed(reader: WeightsReader, documents: Sequence[Tensor], rows_ND: Tensor) -> None:
    table_VD = reader.read_weight("model.embed_tokens.weight")
    first = 0
    for document in documents:
        rows_ND[first : first + len(document)] = table_VD[document].to(rows_ND.dtype)
        first += len(document)


class _MixWeights(NamedTuple):
    norm_D: Tensor
    enorm_D: Tensor
    hnorm_D: Tensor
    eh_proj_DX: Tensor
    table_VD: Tensor


@torch.no_grad()
def _mix(
    reader: WeightsReader,
    layer: Layer,
    documents: Sequence[Tensor],
    last_ND: Tensor,
    mixed_ND: Tensor,
    settings: Settings,
) -> None:
    """Inputs of the MTP block from the last layer's outputs and the next tokens' embeddings, as in model.MTP."""
    prefix = f"model.layers.{layer.number}"
    names = ("model.norm", f"{prefix}.enorm", f"{prefix}.hnorm", f"{prefix}.eh_proj", "model.embed_tokens")
    weights = _MixWeights(*(reader.read_weight(f"{name}.weight").to(settings.dtype) for name in names))

    def normed(x_TD: Tensor, weight_D: Tensor) -> Tensor:
        return nn.functional.rms_norm(x_TD, weight_D.shape, weight_D, layer.config.rms_norm_eps)

    first = 0
    for document in documents:
        rows = slice(first, first + len(document))
        embedded_TD = normed(weights.table_VD[next_tokens(document[None])[0]], weights.enorm_D)
        hidden_TD = normed(normed(last_ND[rows], weights.norm_D), weights.hnorm_D)
        mixed_ND[rows] = torch.cat([embedded_TD, hidden_TD], dim=-1) @ weights.eh_proj_DX.T
        first += len(document)
