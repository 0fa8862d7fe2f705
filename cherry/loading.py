"""Owns filling a sharded model with weights from a file: each rank takes what its own shards need.

It knows nothing of meshes, only of what part of a tensor is here.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from base import storage
from base.errors import MissingFileError, WeightsError
from model.layout import Piece, pieces
from model.transformer import DeepseekV3
from model.weights import WeightsReader

Box = tuple[tuple[int, int], ...]
"""The first and one past the last index of each dimension."""


@torch.no_grad()
def load_weights(model: DeepseekV3, uri: str) -> None:
    """Fill the shards from a Hugging Face folder; each rank reads only the tensors that its rows need.

    Raises:
        MissingFileError: nothing at `uri`.
        WeightsError: tensors are missing or of another shape; the text lists them all.
    """
    reader: WeightsReader | PickledWeights = PickledWeights(uri) if uri.endswith(".pt") else WeightsReader(uri)
    wrong = []
    plan = []
    for name, tensor in [*model.named_parameters(), *_persistent_buffers(model)]:
        (local, box), shape = local_part(tensor), tensor.shape
        whole = torch.empty(shape, device="meta")
        for piece in pieces(name, shape, model.config):
            expected = tuple(whole[piece.part].shape)
            if piece.hf_name not in reader:
                wrong.append(f"missing {piece.hf_name} (shape {list(expected)})")
            elif (found := reader.shape(piece.hf_name)) != expected:
                wrong.append(f"wrong shape of {piece.hf_name}: the model has {list(expected)}, the file {list(found)}")
            else:
                plan.append((local, box, shape, piece))
    if wrong:
        raise WeightsError(f"{uri} does not fit the configured model:\n" + "\n".join(f"  {line}" for line in wrong))
    for local, box, shape, piece in plan:
        _copy_piece(local, box, shape, piece, reader)


class PickledWeights:
    """A .pt file of tensors under the released names, memory-mapped and read with weights_only: no code in it runs.

    Raises:
        MissingFileError: nothing at `path`.
        WeightsError: it is no plain mapping of names to tensors.
    """

    def __init__(self, path: str) -> None:
        if not storage.exists(path):
            raise MissingFileError(f"{path} does not exist. --model_path takes a safetensors folder, or a .pt file.")
        try:
            content = torch.load(storage.local_path(path), map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:  # torch raises pickle's, zipfile's and its own errors here
            raise WeightsError(f"{path} cannot be read as tensors only: {str(error).splitlines()[0]}") from error
        if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
            raise WeightsError(f"{path}: must hold a mapping of names to tensors, like a released state dict")
        self._tensors: dict[str, Tensor] = content

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one tensor."""
        return tuple(self._tensors[name].shape)

    def read_weight(self, name: str) -> Tensor:
        """One tensor; its pages are read when they are copied."""
        return self._tensors[name]


def _copy_piece(
    local: Tensor, box: Box, shape: torch.Size, piece: Piece, reader: WeightsReader | PickledWeights
) -> None:
    """Copy what this rank holds of one stored tensor; `piece.part` places it inside the whole parameter."""
    if (overlap := box_of_piece(piece.part, box, shape)) is not None:
        inside, stored = overlap
        part = reader.read_weight(piece.hf_name)[tuple(slice(*range_) for range_ in stored)]
        local[inside].copy_(part)


def box_of_piece(
    part: tuple[int | slice, ...], box: Box, shape: torch.Size
) -> tuple[tuple[int | slice, ...], Box] | None:
    """Where a piece of a parameter of `shape` meets the `box` that a rank holds; `None` when it does not.

    Returns:
        An index into the rank's part, and the box of the stored tensor that belongs there.
    """
    inside: list[int | slice] = []
    stored: list[tuple[int, int]] = []
    for dim, (first, last) in enumerate(box):
        index = part[dim] if dim < len(part) else slice(None)
        if isinstance(index, int):
            if not first <= index < last:
                return None
            inside.append(index - first)
            continue
        begin, end, _ = index.indices(shape[dim])
        low, high = max(begin, first), min(end, last)
        if low >= high:
            return None
        inside.append(slice(low - first, high - first))
        stored.append((low - begin, high - begin))
    return tuple(inside), tuple(stored)


def local_part(tensor: Tensor) -> tuple[Tensor, Box]:
    """This rank's part of a tensor, sharded over any axes and dimensions, and where it lies in the whole."""
    if not isinstance(tensor, DTensor):
        return tensor, tuple((0, size) for size in tensor.shape)
    local = tensor.to_local()
    _, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return local, tuple((first, first + size) for first, size in zip(offset, local.shape, strict=True))


def _persistent_buffers(model: DeepseekV3) -> list[tuple[str, Tensor]]:
    kept = model.state_dict(keep_vars=True)
    return [(name, buffer) for name, buffer in model.named_buffers() if name in kept]
