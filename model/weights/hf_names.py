"""Hugging Face layout: released names of state dict entries, and config.json, in both directions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from base import config as base_config
from base.errors import WeightsError
from model.model_config import ModelConfig, YarnConfig
from model.numerics.fp8_blocks import DTYPE as FP8
from model.numerics.fp8_blocks import quantization_config

# Released names that duplicate the model's embedding and head.
_DUPLICATES = {"embed_tokens.weight": "embed_tokens.weight", "lm_head.weight": "shared_head.head.weight"}
_TOP = {
    "embed_tokens.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "lm_head.weight": "lm_head.weight",
}
ADAPTER_SUFFIXES = (".lora_A_RD", ".lora_B_FR")
# Fields that config.json and ModelConfig share under one name.
_SHARED_FIELDS = tuple(name for name in ModelConfig.model_fields if name not in {"preset", "rope_scaling"})


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


def hf_config(config: ModelConfig, *, dtype: torch.dtype = torch.bfloat16) -> dict[str, Any]:
    """config.json of a model with this configuration, as transformers 5 and vLLM read it.

    Sigmoid scores are `deepseek_v3`; softmax scores are V2's architecture, `deepseek_v2`. With float8_e4m3fn it
    describes the release's fp8 blocks; all other weights are bf16.
    """
    v3 = config.scoring_func == "sigmoid"
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.rope_scaling is not None:
        # `type` is what the released file says, `rope_type` what transformers 5 reads.
        rope |= {"type": "yarn", "rope_type": "yarn", **config.rope_scaling.model_dump()}
    result: dict[str, Any] = {
        "architectures": ["DeepseekV3ForCausalLM" if v3 else "DeepseekV2ForCausalLM"],
        "model_type": "deepseek_v3" if v3 else "deepseek_v2",
        **{name: getattr(config, name) for name in _SHARED_FIELDS},
        "num_key_value_heads": config.num_attention_heads,
        "topk_method": "noaux_tc" if v3 else ("greedy" if config.n_group == 1 else "group_limited_greedy"),
        "moe_layer_freq": 1,
        "rope_scaling": None if config.rope_scaling is None else dict(rope),
        "rope_parameters": rope,
        "rope_interleave": True,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "use_cache": True,
        "torch_dtype": str(torch.bfloat16 if dtype == FP8 else dtype).removeprefix("torch."),
    }
    if dtype == FP8:
        result["quantization_config"] = quantization_config()
    return result


def config_from_hf(raw: Mapping[str, Any], origin: str = "config.json") -> ModelConfig:
    """ModelConfig that a released or exported config.json describes.

    Raises:
        WeightsError: the file asks for something that this model does not have; all such keys are listed.
        ConfigError: a key has a wrong type, or the combination cannot work.
    """
    rope = dict(raw.get("rope_parameters") or {}) | dict(raw.get("rope_scaling") or {})
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    scoring = raw.get("scoring_func") or ("softmax" if raw.get("model_type") == "deepseek_v2" else "sigmoid")
    wanted: list[tuple[str, Any, tuple[Any, ...]]] = [
        ("model_type", raw.get("model_type"), ("deepseek_v3", "deepseek_v2")),
        ("hidden_act", raw.get("hidden_act", "silu"), ("silu",)),
        ("attention_bias", raw.get("attention_bias", False), (False,)),
        ("tie_word_embeddings", raw.get("tie_word_embeddings", False), (False,)),
        ("moe_layer_freq", raw.get("moe_layer_freq", 1), (1,)),
        ("rope_interleave", raw.get("rope_interleave", True), (True,)),
        ("rope_scaling.rope_type", rope_type, ("default", "yarn")),
        ("scoring_func", scoring, ("sigmoid", "softmax")),
    ]
    wrong = [
        f"  {key}: must be {' or '.join(map(str, ok))} (got {value!r})" for key, value, ok in wanted if value not in ok
    ]
    if rope_type == "yarn":
        needed = ("factor", "mscale", "mscale_all_dim", "original_max_position_embeddings")
        wrong += [f"  rope_scaling.{key}: is required for YaRN and not set" for key in needed if key not in rope]
    if wrong:
        raise WeightsError(f"{origin} is not a DeepSeek-V3 model that can be loaded here:\n" + "\n".join(wrong))
    fields: dict[str, Any] = {
        name: raw.get(name) for name in _SHARED_FIELDS if raw.get(name) is not None or name == "q_lora_rank"
    }
    fields["scoring_func"] = scoring
    fields["rope_theta"] = float(rope.get("rope_theta", raw.get("rope_theta", 10000.0)))
    if isinstance(fields.get("eos_token_id"), list):
        fields["eos_token_id"] = fields["eos_token_id"][0]
    if rope_type == "yarn":
        fields["rope_scaling"] = {key: rope[key] for key in YarnConfig.model_fields if key in rope}
    return base_config.validate(fields, ModelConfig, origin=origin)
