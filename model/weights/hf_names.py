"""Owns how this model's parameters are called in Hugging Face's layout, in both directions.

It reads and writes no files: see model/weights/pretrained.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from model.model_config import ModelConfig

# Released names whose values are the model's own embedding and head once more.
_DUPLICATES = {"embed_tokens.weight": "embed_tokens.weight", "lm_head.weight": "shared_head.head.weight"}
_TOP = {
    "embed_tokens.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "lm_head.weight": "lm_head.weight",
}
_QUANTIZED = re.compile(r"(weight|w13|w2)_(int8|scale)(_E..)?$")
ADAPTER_SUFFIXES = (".lora_A_RD", ".lora_B_FR")
# The projections of attention, dense layers, shared and routed experts; not mlp.gate, eh_proj, embeddings, head.
_PROJECTION = re.compile(
    r"\.(self_attn\.(q|q_a|q_b|kv_b|o)_proj|self_attn\.kv_a_proj_with_mqa"
    r"|mlp\.(experts\.\d+\.|shared_experts\.)?(gate|up|down)_proj)\.weight$"
)
_FUSED_EXPERTS = {"w13": "w13_EFD", "w2": "w2_EDF"}


class Piece(NamedTuple):
    """A part of one of our tensors that is a whole tensor in the released layout."""

    hf_name: str
    part: tuple[int | slice, ...]
    """Picks it out of our tensor: `tensor[part]` is a view."""


def pieces(name: str, shape: torch.Size, config: ModelConfig) -> Iterator[Piece]:
    """The released tensors that make up the model's state `name` of `shape`, MTP's duplicates left out.

    Int8 state (`weight_int8`, `weight_scale`, and the experts' like) maps as its weight does, scales with the
    suffix `_scale`. An adapter's matrices (cherry/lora.py) have no released name: an export merges them.
    """
    if name.endswith(ADAPTER_SUFFIXES):
        return
    suffix = "_scale" if (quantized := _QUANTIZED.search(name)) and quantized[2] == "scale" else ""
    if quantized:
        name = name[: quantized.start()] + _FUSED_EXPERTS.get(quantized[1], quantized[1])
    if name in _TOP:
        yield Piece(_TOP[name] + suffix, ())
        return
    prefix = _layer_prefix(name, config)
    stem, _, leaf = name.rpartition(".")
    if leaf in ("w13_EFD", "w2_EDF"):
        for expert in range(shape[0]):
            yield from _expert_pieces(f"{prefix}.mlp.experts.{expert}", expert, leaf, shape, suffix)
    elif stem.endswith("gate_up_proj"):
        half = shape[0] // 2
        base = f"{prefix}.{_tail(stem, config).removesuffix('gate_up_proj')}"
        yield Piece(f"{base}gate_proj.weight{suffix}", (slice(0, half),))
        yield Piece(f"{base}up_proj.weight{suffix}", (slice(half, None),))
    elif leaf == "e_score_correction_bias_E":
        yield Piece(f"{prefix}.mlp.gate.e_score_correction_bias", ())
    else:
        yield Piece(f"{prefix}.{_tail(name, config)}{suffix}", ())


def _expert_pieces(base: str, expert: int, leaf: str, shape: torch.Size, suffix: str) -> Iterator[Piece]:
    if leaf == "w2_EDF":
        yield Piece(f"{base}.down_proj.weight{suffix}", (expert,))
        return
    half = shape[1] // 2
    yield Piece(f"{base}.gate_proj.weight{suffix}", (expert, slice(0, half)))
    yield Piece(f"{base}.up_proj.weight{suffix}", (expert, slice(half, None)))


def _layer_prefix(name: str, config: ModelConfig) -> str:
    layer = name.split(".")[1] if name.startswith("layers.") else str(config.num_hidden_layers)
    return f"model.layers.{layer}"


def _tail(name: str, config: ModelConfig) -> str:
    """What follows the layer's prefix in the released name."""
    if name.startswith("layers."):
        return name.split(".", 2)[2]
    tail = name.removeprefix("mtp.")
    return f"shared_head.{tail}" if tail == "norm.weight" else tail.removeprefix("block.")


def state_to_hf(name: str, tensor: Tensor, config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """Split one entry of the model's state dict into released names and views of `tensor`.

    With an MTP module the embedding and the head come twice, as in the released files.
    """
    for piece in pieces(name, tensor.shape, config):
        yield piece.hf_name, tensor[piece.part]
    if config.num_nextn_predict_layers and name in _DUPLICATES:
        yield f"model.layers.{config.num_hidden_layers}.{_DUPLICATES[name]}", tensor


def is_projection(hf_name: str) -> bool:
    """Whether a released tensor is one of those that are quantized: fp8 in the release, int8 for serving."""
    return _PROJECTION.search(hf_name) is not None


def is_ignorable(hf_name: str, config: ModelConfig) -> bool:
    """Whether a file may hold this tensor though the model has no place for it.

    Those are the duplicates of embedding and head, stored rotary frequencies, and an MTP module that the
    configuration leaves out.
    """
    mtp = f"model.layers.{config.num_hidden_layers}."
    if hf_name.startswith(mtp):
        return not config.num_nextn_predict_layers or hf_name.removeprefix(mtp) in _DUPLICATES.values()
    return hf_name.endswith("rotary_emb.inv_freq")
