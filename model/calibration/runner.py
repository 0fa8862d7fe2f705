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
from importlib.metadata import version
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
from model.calibration.pace import Pace
from model.calibration.results import LayerWriter, Result, layer_directory, read_coverage
from model.calibration.token_rows import batches_of, map_rows, sync
from model.code_digest import code_digest
from model.model_config import ModelConfig
from model.numerics.formats import is_projection
from model.transformer import next_tokens
from model.weights.pretrained import WeightsReader, read_model_config

IDENTITY_NAME = "calibration.json"
"""File of a work directory with what its results depend on: written first, removed last."""
_MIDDLE, _MIXED = "middle.bin", "mtp.bin"
# What is removed from a work directory; anything else there is not ours.
_OWN = ("layer-*", "hidden-*.bin", _MIDDLE, _MIXED, IDENTITY_NAME)
_READ = (".safetensors", ".json")
# What computes the results, beside torch.
_CODE = ("attention.py", "calibration", "experts.py", "layers.py", "moe.py", "numerics", "rope.py", "transformer.py")


def calibrated_layers(
    source_uri: str,
    documents: Sequence[Tensor],
    work_directory: Path,
    method: Method,
    *,
    wanted: Callable[[str], bool] = is_projection,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    on_progress: Progress | None = None,
) -> Iterator[str]:
    """Directory of each layer's results in `work_directory`, as soon as they are there (model/calibration/results.py).

    Called again with the same arguments, it goes on with the layer after the last one that is there.

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
    found = work.begin(calibration_identity(source_uri, documents, method, wanted=wanted, dtype=dtype))
    settings = Settings(method, wanted, dtype, torch.device(device))
    layers = config.num_hidden_layers + config.num_nextn_predict_layers
    pace = Pace(_sizes(reader, wanted), layers, found, on_progress)
    for number in range(layers):
        if number >= found:
            _calibrate(reader, Layer(number, config), documents, work, settings, pace)
            pace.finish_layer()
        yield work.results(number)


def discard(work_directory: Path) -> None:
    """Remove what a calibration wrote to its work directory, and the directory if nothing else is in it."""
    for own in (own for pattern in _OWN for own in work_directory.glob(pattern)):
        storage.remove_tree(str(own))
    if work_directory.is_dir() and not any(work_directory.iterdir()):
        work_directory.rmdir()


def coverage_of(work_directory: Path) -> list[ExpertCoverage]:
    """What each routed expert was calibrated with, of the layers that are done."""
    layers = sorted(path for path in work_directory.glob("layer-*") if storage.is_committed(str(path)))
    return [expert for path in layers for expert in read_coverage(str(path))]


def _sizes(reader: WeightsReader, wanted: Callable[[str], bool]) -> dict[str, int]:
    """Stored bytes of each weight that is rounded."""
    reader.open_files()
    infos = {name: reader.info(name) for name in reader.names if wanted(name)}
    return {name: info.stop - info.start for name, info in infos.items()}


def _check(documents: Sequence[Tensor], config: ModelConfig) -> None:
    if not documents:
        raise InvalidInputError("the calibration set has no token: give documents with text")
    highest, lowest = (int(ends) for ends in (max(map(torch.max, documents)), min(map(torch.min, documents))))
    if lowest < 0 or highest >= config.vocab_size:
        raise InvalidInputError(
            f"calibration tokens must be 0 to {config.vocab_size - 1}, the model's vocabulary (got {lowest} to "
            f"{highest}). Encode the documents with the model's own tokenizer."
        )


def calibration_identity(
    source_uri: str,
    documents: Sequence[Tensor],
    method: Method,
    *,
    wanted: Callable[[str], bool] = is_projection,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:
    """What results depend on, as JSON values: those of another identity are not gone on with.

    `tokens` is a digest of the documents. Of the source's files size and version count, as in
    `model.quantization.manifest.describe_origin`.
    """
    hasher = hashlib.sha256()
    for document in documents:
        hasher.update(f"{len(document)}:".encode())
        hasher.update(document.contiguous().numpy().tobytes())
    files = [[file.name, file.bytes, file.version] for file in storage.find(source_uri) if file.name.endswith(_READ)]
    names = [name for name in WeightsReader(source_uri).names if wanted(name)]
    return {
        "source": storage.fingerprint([source_uri, files, names]),
        "tokens": hasher.hexdigest(),
        "method": {key: str(value) for key, value in asdict(method).items()},
        "dtype": str(dtype),
        "code": [code_digest(_CODE), version("torch")],
    }


class _Work:
    """The work directory: results by layer, and the hidden states before the layer that is next."""

    def __init__(self, directory: Path, rows: int, config: ModelConfig, dtype: torch.dtype) -> None:
        self.directory, self._shape, self._dtype = directory, (rows, config.hidden_size), dtype

    def begin(self, identity: dict[str, Any]) -> int:
        """Number of layers that are finished; results of another identity are removed."""
        path = self.directory / IDENTITY_NAME
        if not path.exists() or _read_object(path) != identity or not self._can_resume():
            discard(self.directory)
            storage.write_json(str(path), identity)
        return self._finished()

    def _finished(self) -> int:
        number = 0
        while storage.is_committed(self.results(number)):
            number += 1
        return number

    def _can_resume(self) -> bool:
        done = self._finished()
        path, size = self.hidden(done), math.prod(self._shape) * self._dtype.itemsize
        return not done or (path.exists() and path.stat().st_size == size)

    def results(self, number: int) -> str:
        """Directory of a layer's results."""
        return layer_directory(self.directory, number)

    def hidden(self, number: int) -> Path:
        """File of the hidden states before a layer; those after the last one are there as well."""
        return self.directory / f"hidden-{number:05}.bin"

    def rows(self, path: Path) -> Tensor:
        """Mapped rows of one file."""
        return map_rows(path, self._shape, self._dtype)


def _read_object(path: Path) -> Any:
    """A JSON document; `None` for a damaged one."""
    try:
        return storage.read_json(str(path))
    except ValueError:
        return None


def _calibrate(
    reader: WeightsReader, layer: Layer, documents: Sequence[Tensor], work: _Work, settings: Settings, pace: Pace
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

    def keep(name: str, result: Result) -> None:
        writer.keep(name, result)
        pace.keep(name)

    coverage = block.run(keep)
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
