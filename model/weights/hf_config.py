"""config.json: a folder's model configuration, read and written as transformers 5 computes it.

What a key that is left out means depends on `model_type`, for each of transformers' configuration classes has defaults
of its own. A key that changes what the model computes, and that cannot be followed here, is refused by name; so is one
that is not known.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from base import config as base_config
from base.config import Problem
from base.errors import WeightsError
from model.model_config import ModelConfig, YarnConfig
from model.numerics.e4m3 import DTYPE as FP8
from model.numerics.fp8_blocks import BLOCK, quantization_config

# Defaults of transformers.DeepseekV3Config, 5.17 to 5.23.
_V3_DEFAULTS: dict[str, Any] = {
    "vocab_size": 129280,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "n_shared_experts": 1,
    "n_routed_experts": 256,
    "routed_scaling_factor": 2.5,
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "qk_nope_head_dim": 128,
    "n_group": 8,
    "topk_group": 4,
    "num_experts_per_tok": 8,
    "first_k_dense_replace": 3,
    "norm_topk_prob": True,
    "max_position_embeddings": 4096,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "num_nextn_predict_layers": 1,
}
# Defaults of transformers.DeepseekV2Config, 5.17 to 5.23; it has no MTP.
_V2_DEFAULTS: dict[str, Any] = {
    "vocab_size": 102400,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "moe_intermediate_size": 1407,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "n_shared_experts": 2,
    "n_routed_experts": 64,
    "routed_scaling_factor": 1.0,
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "qk_nope_head_dim": 128,
    "n_group": None,
    "topk_group": None,
    "topk_method": "greedy",
    "num_experts_per_tok": None,
    "first_k_dense_replace": 0,
    "norm_topk_prob": False,
    "max_position_embeddings": 2048,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "num_nextn_predict_layers": 0,
}
# Moonshot's own class of kimi_k2 is DeepSeek-V3's under another name, defaults included.
_DEFAULTS = {"deepseek_v3": _V3_DEFAULTS, "kimi_k2": _V3_DEFAULTS, "deepseek_v2": _V2_DEFAULTS}
# Second names of fields in transformers' classes (attribute_map).
_V3_ALIASES = {"num_mtp_layers": "num_nextn_predict_layers", "num_local_experts": "n_routed_experts"}
_V2_ALIASES = {"num_experts": "n_routed_experts"}
# Keys that can have only these values; transformers' default of each is among them.
_FIXED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "attention_dropout": (0.0, None),
    "tie_word_embeddings": (False,),
    "rope_interleave": (True,),
    "partial_rotary_factor": (1.0, None),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    # Read by the released code alone.
    "moe_layer_freq": (1,),
    "ep_size": (1, None),
}
_V3_FIXED: dict[str, tuple[Any, ...]] = {"scoring_func": ("sigmoid",), "topk_method": ("noaux_tc",)}
_V2_FIXED: dict[str, tuple[Any, ...]] = {
    "scoring_func": ("softmax",),
    "topk_method": ("greedy", "group_limited_greedy"),
}
# Fields that config.json and ModelConfig share under one name.
_SHARED_FIELDS = tuple(name for name in ModelConfig.model_fields if name not in {"preset", "rope_scaling"})
# Keys with rules of their own, below.
_CHECKED = frozenset({
    "head_dim", "num_key_value_heads", "qk_head_dim", "quantization_config", "rope_parameters", "rope_scaling",
    "rope_theta",
})  # fmt: skip
# Keys that do not change what the model computes: bookkeeping, losses of the training code, inference switches, and
# what older versions of transformers wrote into every config.json (generation settings, labels).
_HARMLESS = frozenset({
    "architectures", "assistant_confidence_threshold", "assistant_lookbehind", "attn_implementation",
    "auto_map", "aux_loss_alpha", "bad_words_ids", "begin_suppress_tokens", "chunk_size_feed_forward",
    "cross_attention_hidden_size", "decoder_start_token_id", "diversity_penalty", "do_sample", "dtype",
    "early_stopping", "encoder_no_repeat_ngram_size", "encoder_repetition_penalty", "epsilon_cutoff",
    "eta_cutoff", "experts_implementation", "exponential_decay_length_penalty", "finetuning_task",
    "forced_bos_token_id", "forced_eos_token_id", "id2label", "label2id", "length_penalty", "max_length",
    "min_length", "model_type", "name_or_path", "no_repeat_ngram_size", "num_assistant_tokens",
    "num_assistant_tokens_schedule", "num_beam_groups", "num_beams", "num_labels", "num_return_sequences",
    "output_attentions", "output_hidden_states", "output_router_logits", "output_scores", "pad_token_id",
    "prefix", "pretraining_tp", "problem_type", "pruned_heads", "remove_invalid_values", "repetition_penalty",
    "return_dict", "return_dict_in_generate", "router_aux_loss_coef", "sep_token_id", "seq_aux",
    "suppress_tokens", "target_lookbehind", "task_specific_params", "temperature", "tf_legacy_loss",
    "tie_encoder_decoder", "tokenizer_class", "top_k", "top_p", "torch_dtype", "torchscript",
    "transformers_version", "typical_p", "use_bfloat16", "use_cache",
})  # fmt: skip
_ROPE_KEYS = frozenset({"rope_type", "type", "rope_theta", "partial_rotary_factor"})
_YARN_KEYS = _ROPE_KEYS | set(YarnConfig.model_fields)


def hf_config(config: ModelConfig, *, dtype: torch.dtype = torch.bfloat16) -> dict[str, Any]:
    """config.json of a model with this configuration, as transformers 5 and vLLM read it.

    Sigmoid scores are `deepseek_v3`; softmax scores are V2's architecture, `deepseek_v2`. With float8_e4m3fn it
    describes the release's fp8 blocks; all other weights are bf16.
    """
    v3 = config.scoring_func == "sigmoid"
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.rope_scaling is not None:
        # `type` is what the released file says, `rope_type` what transformers 5 reads.
        rope |= {"type": "yarn", "rope_type": "yarn", **config.rope_scaling.model_dump(exclude_none=True)}
        if config.rope_scaling.truncate:
            del rope["truncate"]
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


def text_config(raw: Mapping[str, Any]) -> Any:
    """Configuration of the language model: Kimi-K2.5's is inside its config.json, every other file is its own."""
    if raw.get("model_type") != "kimi_k25":
        return raw
    text = raw.get("text_config")
    return {"model_type": "deepseek_v3", **text} if isinstance(text, Mapping) else text


def config_from_hf(raw: object, origin: str = "config.json") -> ModelConfig:
    """ModelConfig that a released or exported config.json describes; of Kimi-K2.5, its language model's.

    Args:
        raw: the parsed file.
        origin: its path, for errors.

    Raises:
        WeightsError: the file asks for something that this model does not have; all such keys are listed.
        ConfigError: a key has a wrong type, or the combination cannot work.
    """
    if isinstance(raw, Mapping) and (text := text_config(raw)) is not raw:
        raw, origin = text, f"{origin}, text_config"
    if not isinstance(raw, Mapping):
        raise WeightsError(f"{origin}: must be a JSON object (got {_short(raw)}). Copy or export the folder again.")
    model_type = raw.get("model_type")
    defaults = _DEFAULTS.get(model_type) if isinstance(model_type, str) else None
    if defaults is None:
        raise WeightsError(
            f"{origin}: model_type: must be one of {', '.join(_DEFAULTS)}, kimi_k25 (got {_short(model_type)}). "
            "Another architecture cannot be loaded here."
        )
    v3 = defaults is _V3_DEFAULTS
    aliases = _V3_ALIASES if v3 else _V2_ALIASES
    given = {**defaults, **raw, **{name: raw[alias] for alias, name in aliases.items() if alias in raw}}
    wrong = [
        *_unsupported_keys(raw, _FIXED | (_V3_FIXED if v3 else _V2_FIXED), aliases),
        *_inconsistent_keys(given, raw),
        *_unsupported_rope(raw),
        *_unsupported_quantization(raw.get("quantization_config")),
    ]
    if wrong:
        lines = "\n".join(f"  {problem}" for problem in wrong)
        raise WeightsError(f"{origin} is not of a model that can be loaded here: {len(wrong)} problems\n{lines}")
    return base_config.validate(_fields(given, _rope_of(raw)[1], v3=v3), ModelConfig, origin=origin)


def _fields(given: Mapping[str, Any], rope: Mapping[str, Any], *, v3: bool) -> dict[str, Any]:
    """Fields of ModelConfig, not validated yet, from keys whose defaults are filled in."""
    fields = {name: given.get(name) for name in _SHARED_FIELDS}
    fields["scoring_func"] = "sigmoid" if v3 else "softmax"
    if given["norm_topk_prob"] is None:
        fields["norm_topk_prob"] = False
    if not v3 and given["topk_method"] == "greedy":
        fields |= {"n_group": 1, "topk_group": 1}
    if isinstance(eos := given["eos_token_id"], list):
        fields["eos_token_id"] = eos[0]
    layers, dense = given["num_hidden_layers"], given["first_k_dense_replace"]
    if type(layers) is int and type(dense) is int:
        fields["first_k_dense_replace"] = min(dense, layers)
    fields["rope_theta"] = rope.get("rope_theta", given.get("rope_theta", 10000.0))
    fields["rope_scaling"] = _yarn(rope, given["max_position_embeddings"]) if _rope_type(rope) == "yarn" else None
    return fields


def _unsupported_keys(
    raw: Mapping[str, Any], fixed: Mapping[str, tuple[Any, ...]], aliases: Mapping[str, str]
) -> Iterator[Problem]:
    for key, value in raw.items():
        if key.startswith("index_"):
            yield Problem(key, "sparse attention (DSA) is not supported", value)
        elif key in fixed:
            if value not in fixed[key]:
                yield Problem(key, f"must be {' or '.join(json.dumps(allowed) for allowed in fixed[key])}", value)
        elif key in aliases:
            if raw.get(aliases[key], value) != value:
                yield Problem(key, f"must equal {aliases[key]} ({_short(raw[aliases[key]])})", value)
        elif key not in _SHARED_FIELDS and key not in _CHECKED | _HARMLESS and not key.startswith("_"):
            yield Problem(key, "unknown key: remove it if it does not change what the model computes", value)


def _inconsistent_keys(given: Mapping[str, Any], raw: Mapping[str, Any]) -> Iterator[Problem]:
    """Keys that repeat others and differ from them, which transformers would follow or fail on."""
    heads, rotary, plain = (given[key] for key in ("num_attention_heads", "qk_rope_head_dim", "qk_nope_head_dim"))
    if given["num_key_value_heads"] not in (heads, None):
        default = "" if "num_key_value_heads" in raw else "; left out, it has the default of the model_type"
        rule = f"must equal num_attention_heads ({_short(heads)}){default}"
        yield Problem("num_key_value_heads", rule, given["num_key_value_heads"])
    if given.get("head_dim") not in (rotary, None):
        yield Problem("head_dim", f"must equal qk_rope_head_dim ({_short(rotary)})", given["head_dim"])
    if type(rotary) is type(plain) is int and given.get("qk_head_dim") not in (rotary + plain, None):
        rule = f"must equal qk_nope_head_dim + qk_rope_head_dim ({rotary + plain})"
        yield Problem("qk_head_dim", rule, given["qk_head_dim"])
    if given["eos_token_id"] == []:
        yield Problem("eos_token_id", "must be a token's id, or a list of at least one", [])


def _rope_of(raw: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """Name and value of the rope object that counts: rope_scaling unless it is empty, as in transformers."""
    name = "rope_scaling" if raw.get("rope_scaling") else "rope_parameters"
    rope = raw.get(name)
    return name, rope if isinstance(rope, Mapping) else {}


def _rope_type(rope: Mapping[str, Any]) -> object:
    return rope.get("rope_type", rope.get("type", "default"))


def _unsupported_rope(raw: Mapping[str, Any]) -> Iterator[Problem]:
    for key in ("rope_scaling", "rope_parameters"):
        if not isinstance(raw.get(key), Mapping | None):
            yield Problem(key, "must be an object or null", raw[key])
    name, rope = _rope_of(raw)
    rope_type, yarn = _rope_type(rope), _rope_type(rope) == "yarn"
    if rope_type not in ("default", "yarn"):
        yield Problem(f"{name}.{'rope_type' if 'rope_type' in rope else 'type'}", "must be default or yarn", rope_type)
        return
    for key in sorted(rope.keys() - (_YARN_KEYS if yarn else _ROPE_KEYS)):
        yield Problem(f"{name}.{key}", f"unknown key of rope_type {rope_type}", rope[key])
    if rope.get("partial_rotary_factor") not in _FIXED["partial_rotary_factor"]:
        yield Problem(f"{name}.partial_rotary_factor", "must be 1.0", rope["partial_rotary_factor"])
    if yarn and ("factor" not in rope or (rope["factor"] is None and rope.get("mscale_all_dim"))):
        yield Problem(f"{name}.factor", "is required for YaRN", None)


def _yarn(rope: Mapping[str, Any], max_position_embeddings: object) -> dict[str, Any]:
    """Fields of YarnConfig as transformers derives them: 0 and null count as left out, but for truncate."""
    fields: dict[str, Any] = {
        "factor": rope["factor"],
        "original_max_position_embeddings": rope.get("original_max_position_embeddings", max_position_embeddings),
        "mscale": rope.get("mscale") or None,
        "mscale_all_dim": rope.get("mscale_all_dim") or None,
        "attention_factor": rope.get("attention_factor"),
        "truncate": rope.get("truncate", True) or False,
    }
    fields |= {key: rope[key] for key in ("beta_fast", "beta_slow") if rope.get(key)}
    original = fields["original_max_position_embeddings"]
    if fields["factor"] is None and type(max_position_embeddings) is type(original) is int and original > 0:
        fields["factor"] = max_position_embeddings / original
    return fields


def _unsupported_quantization(described: object) -> Iterator[Problem]:
    """Keys of `quantization_config` that differ from DeepSeek's fp8 blocks, when it is of the method fp8."""
    if not isinstance(described, Mapping | None):
        yield Problem("quantization_config", "must be an object or null", described)
    elif described is not None and described.get("quant_method") == "fp8":
        allowed: dict[str, list[Any]] = {
            "weight_block_size": [[BLOCK, BLOCK]],
            "fmt": ["e4m3", None],
            "activation_scheme": ["dynamic", None],
        }
        for key, values in allowed.items():
            if described.get(key) not in values:
                yield Problem(f"quantization_config.{key}", f"must be {json.dumps(values[0])}", described.get(key))


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
