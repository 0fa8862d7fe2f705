"""One decoder layer of a weights folder by itself: a block without its routed experts, and one expert at a time.

Shapes: D hidden, F an expert's intermediate width, X = 2 F.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from model.model_config import ModelConfig
from model.moe import MoE
from model.transformer import Block
from model.weights.hf_names import Piece, pieces
from model.weights.pretrained import Part, load_parts
from model.weights.reader import WeightsReader
from model.weights.safetensors_file import Box, SafetensorsFile, whole_box

_BESIDE_THE_BLOCK = (".mlp.experts.", ".enorm.", ".hnorm.", ".eh_proj.", ".shared_head.", ".embed_tokens.")


class Layer(NamedTuple):
    """A decoder layer's place: `number` counts the model's layers, MTP's last."""

    number: int
    config: ModelConfig

    @property
    def is_mtp(self) -> bool:
        """Whether it is the MTP module's block."""
        return self.number == self.config.num_hidden_layers

    @property
    def is_moe(self) -> bool:
        """Whether its feed-forward is a mixture of experts."""
        return self.is_mtp or self.number >= self.config.first_k_dense_replace

    def pieces(self, name: str, shape: torch.Size) -> list[Piece]:
        """Released tensors of one entry of the block's state."""
        prefix = "mtp.block" if self.is_mtp else f"layers.{self.number}"
        return list(pieces(f"{prefix}.{name}", shape, self.config))

    def expert_names(self, expert: int) -> tuple[str, str, str]:
        """Released names of an expert's gate, up and down projection."""
        prefix = f"model.layers.{self.number}.mlp.experts.{expert}"
        return f"{prefix}.gate_proj.weight", f"{prefix}.up_proj.weight", f"{prefix}.down_proj.weight"


class _BlockSource:
    """Source of a block's tensors: those of its layer, without routed experts and what MTP has around its block."""

    def __init__(self, reader: WeightsReader, layer: Layer) -> None:
        self.uri = reader.uri
        self._reader = reader
        prefix = f"model.layers.{layer.number}."
        own = [name for name in reader.names if name.startswith(prefix)]
        self.names = [name for name in own if not any(part in name for part in _BESIDE_THE_BLOCK)]

    def __contains__(self, name: str) -> bool:
        return name in self._reader

    def shape(self, name: str) -> tuple[int, ...]:
        return self._reader.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return self._reader.dtype(name)

    def read_box(self, name: str, box: Box) -> Tensor:
        return self._reader.read_box(name, box)

    def open_files(self) -> None:
        """Files open as they are needed: most belong to other layers."""

    def remote_file(self, name: str) -> SafetensorsFile | None:
        return self._reader.remote_file(name)


def load_block(reader: WeightsReader, layer: Layer, dtype: torch.dtype, device: torch.device) -> Block:
    """The layer's block in evaluation mode; in a mixture of experts `mlp.experts` is an empty module.

    Raises:
        WeightsError: lists the layer's tensors that are missing, unexpected, of another shape or damaged.
    """
    with torch.device("meta"):
        block = Block(layer.config, moe=layer.is_moe)
    if isinstance(block.mlp, MoE):
        setattr(block.mlp, "experts", nn.Module())  # noqa: B010  (mypy knows it as Experts)
    block.to(dtype).to_empty(device=device)
    source = _BlockSource(reader, layer)
    prefix = "mtp.block" if layer.is_mtp else f"layers.{layer.number}"
    state = block.state_dict()
    parts = [Part(f"{prefix}.{name}", value.shape, whole_box(value.shape), value) for name, value in state.items()]
    load_parts(parts, source, layer.config)
    if isinstance(block.mlp, MoE):
        block.mlp.tokens_per_expert_E.zero_()
    return block.eval()


def read_expert(
    reader: WeightsReader, layer: Layer, expert: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Fused gate and up projection [X, D], and down projection [D, F], of one routed expert; both are copies.

    Raises:
        WeightsError: a tensor is missing or damaged.
    """
    gate, up, down = (reader.read_weight(name).to(device, dtype) for name in layer.expert_names(expert))
    return torch.cat([gate, up]), down.clone()
