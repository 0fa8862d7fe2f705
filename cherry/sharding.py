"""Owns how a model is spread over the ranks: the mesh, the order of sharding, and filling shards with weights.

It knows nothing of losses or steps. It is the only file that calls `fully_shard`; nothing of the full model ever sits
on one rank: meta device, sharding, `to_empty`, then each rank fills its own rows.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from base import storage
from base.errors import MissingFileError, WeightsError
from cherry.config import ParallelConfig
from model.layout import Piece, pieces
from model.transformer import Block, DeepseekV3, initial_values
from model.weights import WeightsReader


def build_mesh(config: ParallelConfig, device: torch.device) -> DeviceMesh | None:
    """The (replicate, shard) mesh, or a plain shard mesh; `None` for one CPU rank, where sharding only costs time."""
    ranks = dist.get_world_size()
    if ranks == 1 and device.type == "cpu":
        return None
    shard = config.shard or ranks // config.replicate
    if config.replicate == 1:
        return init_device_mesh(device.type, (shard,), mesh_dim_names=("shard",))
    return init_device_mesh(device.type, (config.replicate, shard), mesh_dim_names=("replicate", "shard"))


def shard_model(root: nn.Module, mesh: DeviceMesh | None, precision: str) -> None:
    """Shard every block of `root` by itself, then what is left, in place.

    Parameters, gradients' reduction and optimizer states are fp32; with bf16 each block is gathered and computed
    in bf16. Gradients are summed over ranks: the loss is divided by the count of tokens of all of them.
    """
    if mesh is None:
        return
    param_dtype = torch.bfloat16 if precision == "bf16" else None
    policy = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=torch.float32)
    for module in root.modules():
        if isinstance(module, Block):
            fully_shard(module, mesh=mesh, mp_policy=policy)
    fully_shard(root, mesh=mesh, mp_policy=policy)
    for module in root.modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)  # gloo has no premultiplied sum
            module.set_gradient_divide_factor(1.0)


@torch.no_grad()
def initialize(model: DeepseekV3, seed: int) -> None:
    """Random weights, each parameter's rows drawn by name and position: the same at every world size."""
    std = model.config.initializer_range
    for name, parameter in model.named_parameters():
        local, rows, _ = _local(parameter)
        if local.numel():
            local.copy_(initial_values(name, parameter.shape, seed=seed, std=std, rows=rows))
    for buffer in model.buffers():
        buffer.zero_()


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
        local, rows, shape = _local(tensor)
        whole = torch.empty(shape, device="meta")
        for piece in pieces(name, shape, model.config):
            expected = tuple(whole[piece.part].shape)
            if piece.hf_name not in reader:
                wrong.append(f"missing {piece.hf_name} (shape {list(expected)})")
            elif (found := reader.shape(piece.hf_name)) != expected:
                wrong.append(f"wrong shape of {piece.hf_name}: the model has {list(expected)}, the file {list(found)}")
            else:
                plan.append((local, rows, shape, piece))
    if wrong:
        raise WeightsError(f"{uri} does not fit the configured model:\n" + "\n".join(f"  {line}" for line in wrong))
    for local, rows, shape, piece in plan:
        _copy_piece(local, rows, shape[0], piece, reader)


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
    local: Tensor, rows: tuple[int, int], height: int, piece: Piece, reader: WeightsReader | PickledWeights
) -> None:
    """Copy what this rank holds of one stored tensor; `piece.part` places it inside the whole parameter."""
    first, last = rows
    index, *rest = piece.part or (slice(None),)
    if isinstance(index, int):
        if first <= index < last:
            local[(index - first, *rest)].copy_(reader.read_weight(piece.hf_name))
        return
    begin, end, _ = index.indices(height)
    low, high = max(begin, first), min(end, last)
    if low < high:
        local[low - first : high - first].copy_(reader.read_weight(piece.hf_name)[low - begin : high - begin])


def _local(tensor: Tensor) -> tuple[Tensor, tuple[int, int], torch.Size]:
    """This rank's part of a parameter, its first and one past its last row, and the whole shape."""
    if not isinstance(tensor, DTensor):
        return tensor, (0, tensor.shape[0]), tensor.shape
    local = tensor.to_local()
    _, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return local, (offset[0], offset[0] + local.shape[0]), tensor.shape


def _persistent_buffers(model: DeepseekV3) -> list[tuple[str, Tensor]]:
    kept = model.state_dict(keep_vars=True)
    return [(name, buffer) for name, buffer in model.named_buffers() if name in kept]
