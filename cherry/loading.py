"""Loading of weights into a sharded model: each rank reads only the bytes that its shards need."""

from __future__ import annotations

import pickle
import zipfile

import torch
from torch import Tensor

from base import storage
from base.errors import MissingFileError, WeightsError
from base.storage import Progress
from cherry.distributed.local_part import local_part
from cherry.job_config import PICKLED_WEIGHTS
from model.transformer import DeepseekV3
from model.weights.pretrained import Part, load_parts
from model.weights.reader import Source, WeightsReader
from model.weights.safetensors_file import Box, SafetensorsFile


def load_weights(model: DeepseekV3, uri: str, *, on_progress: Progress | None = None) -> None:
    """Load the shards of this rank from a Hugging Face folder or a .pt file.

    Args:
        on_progress: called every few seconds with a line for people and the fraction of this rank's bytes that is read.

    Raises:
        MissingFileError: there is nothing at `uri`.
        WeightsError: tensors are missing, unexpected, of another shape or without scales, or files are damaged. The
            text lists them all; the model is unchanged.
    """
    source: Source = PickledWeights(uri) if uri.endswith(PICKLED_WEIGHTS) else WeightsReader(uri)
    state = [*model.named_parameters(), *_persistent_buffers(model)]
    parts = [Part(name, tensor.shape, box, local) for name, tensor in state for local, box in [local_part(tensor)]]
    load_parts(parts, source, model.config, on_progress=on_progress)


class PickledWeights:
    """Weights of a .pt file under DeepSeek's released names, memory-mapped; `weights_only` runs no code from the file.

    Raises:
        MissingFileError: there is nothing at `path`.
        WeightsError: the file is not a plain mapping of names to tensors.
    """

    def __init__(self, path: str) -> None:
        self.uri = path
        if not storage.exists(path):
            raise MissingFileError(f"{path} does not exist. --model_path takes a safetensors folder, or a .pt file.")
        local = storage.local_path(path)
        if not storage.is_file(path):
            raise MissingFileError(f"{path} is a folder, and its name that of a file of weights. Rename it.")
        if not zipfile.is_zipfile(local):
            raise WeightsError(
                f"{path} is damaged, or was saved in the format of torch before 1.6, which cannot be read in parts. "
                f"Save it again with torch.save(torch.load({path!r}), {path!r})."
            )
        try:
            content = torch.load(local, map_location="cpu", weights_only=True, mmap=True)
        except pickle.UnpicklingError as error:
            raise WeightsError(
                f"{path} holds more than tensors, like a whole module. Save model.state_dict() alone."
            ) from error
        except Exception as error:  # torch raises zipfile's and its own errors here
            raise WeightsError(f"{path} cannot be read as tensors only: {str(error).splitlines()[0]}") from error
        self._tensors = _named_tensors(path, content)

    @property
    def names(self) -> list[str]:
        """Names of all tensors, in the order of the file."""
        return list(self._tensors)

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return tuple(self._tensors[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of a tensor, as stored."""
        return self._tensors[name].dtype

    def read_box(self, name: str, box: Box) -> Tensor:
        """Slice of a tensor; its pages are read from disk when it is copied."""
        return self._tensors[name][tuple(slice(*bounds) for bounds in box)]

    def open_files(self) -> None:
        """Nothing to open: the file was mapped on construction."""

    def remote_file(self, name: str) -> SafetensorsFile | None:
        """None: tensors are read from the mapped file."""
        return None


def _named_tensors(path: str, content: object) -> dict[str, Tensor]:
    """`content` of the file at `path`, which must be a state dict.

    Raises:
        WeightsError: names the key that is no tensor's name, or that holds the tensors.
    """
    if isinstance(content, dict) and not content:
        raise WeightsError(f"{path} holds no tensors. Save model.state_dict() in it.")
    if not isinstance(content, dict):
        raise WeightsError(f"{path}: must hold a mapping of names to tensors (got {type(content).__name__})")
    for key, value in content.items():
        if isinstance(value, dict) and any(isinstance(inner, Tensor) for inner in value.values()):
            raise WeightsError(f"{path} holds its tensors under the key {key!r}. Save that mapping alone.")
    for key, value in content.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise WeightsError(
                f"{path}: must hold a mapping of names to tensors (got a {type(value).__name__} under the key "
                f"{key!r}). Save model.state_dict() alone."
            )
    return content


def _persistent_buffers(model: DeepseekV3) -> list[tuple[str, Tensor]]:
    kept = model.state_dict(keep_vars=True)
    return [(name, buffer) for name, buffer in model.named_buffers() if name in kept]
