"""Hugging Face layout: released names of state dict entries, in both directions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from model.model_config import ModelConfig

# Released names that duplicate the model's embedding and head.
_DUPLICATES = {"embed_tokens.weight": "embed_tokens.weight", "lm_head.weight": "shared_head.head.weight"}
_TOP = {
    "embed_tokens.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "lm_head.weight": "lm_head.weight",
}
ADAPTER_SUFFIXES = (".lora_A_RD", ".lora_B_FR")


class Piece(NamedTuple):
    """Slice of a state entry that is one tensor in the released layout."""

    hf_name: str
    part: tuple[int | slice, ...]
    """Index of the slice: `entry[part]` is a view."""


def pieces(name: str, shape: torch.Size, config: ModelConfig, suffix: str = "") -> Iterator[Piece]:
    """Released tensors that make up the model's state entry `name`, with the slice of `shape` that each one is.

    MTP's duplicates are left out. An adapter's matrices (cherry/lora.py) have no released name: an export merges them.

    Args:
        shape: shape of the state entry; a quantized one may be narrower in its last dimension than the plain weight.
        suffix: appended to every released name, like a quantized weight's `_scale`.
    """
    if name.endswith(ADAPTER_SUFFIXES):
        return
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
        yield Piece(f"{prefix}.mlp.gate.e_score_correction_bias{suffix}", ())
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
    """Released name without the layer's prefix."""
    if name.startswith("layers."):
        return name.split(".", 2)[2]
    tail = name.removeprefix("mtp.")
    return f"shared_head.{tail}" if tail == "norm.weight" else tail.removeprefix("block.")


def state_to_hf(name: str, tensor: Tensor, config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """Released names of one state dict entry, each with its view of `tensor`.

    With an MTP module the embedding and the head are yielded twice, as the released files hold them.
    """
    for piece in pieces(name, tensor.shape, config):
        yield piece.hf_name, tensor[piece.part]
    if config.num_nextn_predict_layers and name in _DUPLICATES:
        yield f"model.layers.{config.num_hidden_layers}.{_DUPLICATES[name]}", tensor


def is_ignorable(hf_name: str, config: ModelConfig) -> bool:
    """Whether a file may hold this tensor although the model has no entry for it.

    True for duplicates of embedding and head, stored rotary frequencies, and an MTP module that the configuration
    leaves out.
    """
    mtp = f"model.layers.{config.num_hidden_layers}."
    if hf_name.startswith(mtp):
        return not config.num_nextn_predict_layers or hf_name.removeprefix(mtp) in _DUPLICATES.values()
    return hf_name.endswith("rotary_emb.inv_freq")
