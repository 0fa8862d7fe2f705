"""config.json: the defaults of transformers' classes, released configurations, and what is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from base.errors import ConfigError, WeightsError
from model.model_config import PRESETS, ModelConfig
from model.weights.hf_config import _V2_DEFAULTS, _V3_DEFAULTS, config_from_hf, hf_config

# Values of released config.json files, by model.
RELEASES: dict[str, dict[str, Any]] = json.loads((Path(__file__).parents[1] / "released_configs.json").read_text())
V3, V2, GIGACHAT = (RELEASES[name] for name in ("DeepSeek-V3 and R1", "DeepSeek-V2", "GigaChat"))


@pytest.mark.parametrize("preset", list(PRESETS))
def test_an_exported_config_is_read_back(preset: str) -> None:
    config = ModelConfig(**PRESETS[preset])
    raw = json.loads(json.dumps(hf_config(config)))
    assert config_from_hf(raw) == config
    assert raw["topk_method"] == ("greedy" if preset == "16b" else "noaux_tc")
    if preset == "671b":
        assert raw["rope_scaling"]["type"] == raw["rope_scaling"]["rope_type"] == "yarn"
        assert raw["rope_parameters"]["rope_theta"] == raw["rope_theta"] == 10000.0


@pytest.mark.parametrize("release", list(RELEASES))
def test_released_configurations_are_read_and_survive_an_export(release: str) -> None:
    config = config_from_hf(RELEASES[release])
    assert config_from_hf(json.loads(json.dumps(hf_config(config)))) == config


def test_values_of_released_configurations() -> None:
    assert config_from_hf(V3) == ModelConfig(**{**PRESETS["671b"], "initializer_range": 0.02})
    assert config_from_hf(RELEASES["DeepSeek-V3.1"]) == config_from_hf(V3)
    assert config_from_hf(V3).softmax_scale == pytest.approx(0.135234, abs=1e-6)
    assert config_from_hf(RELEASES["DeepSeek-V2-Lite"]) == ModelConfig(**PRESETS["16b"])
    kimi = config_from_hf(RELEASES["Kimi-K2"])
    assert (kimi.n_routed_experts, kimi.rope_theta, kimi.routed_scaling_factor) == (384, 50000.0, 2.827)
    assert config_from_hf(RELEASES["Kimi-K2.5"]) == kimi.model_copy(update={"rms_norm_eps": 1e-5})
    assert (v2 := config_from_hf(V2)).scoring_func == "softmax"
    assert (v2.n_group, v2.topk_group, v2.norm_topk_prob) == (8, 3, False)
    giga = config_from_hf(GIGACHAT)
    assert giga.rope_scaling is not None
    assert (giga.rope_theta, giga.rope_scaling.factor, giga.v_head_dim) == (100000.0, 64.0, 192)


@pytest.mark.parametrize(("name", "defaults"), [("DeepseekV3Config", _V3_DEFAULTS), ("DeepseekV2Config", _V2_DEFAULTS)])
def test_defaults_are_those_of_transformers(name: str, defaults: dict[str, Any]) -> None:
    """The plain class attributes, for the instance fills in num_key_value_heads."""
    transformers = pytest.importorskip("transformers")
    theirs = getattr(transformers, name)
    for key, value in defaults.items():
        if key == "num_nextn_predict_layers":
            assert value == getattr(theirs, "num_mtp_layers", 0)
        else:
            assert value == getattr(theirs, key), key
    assert theirs.hidden_act == "silu"
    assert theirs.default_theta == 10000.0
    for key in ("attention_bias", "tie_word_embeddings", "attention_dropout"):
        assert not getattr(theirs, key)


def test_keys_left_out_have_the_defaults_of_the_model_type() -> None:
    v3 = config_from_hf({"model_type": "deepseek_v3"})
    assert (v3.routed_scaling_factor, v3.n_group, v3.topk_group, v3.first_k_dense_replace) == (2.5, 8, 4, 3)
    assert (v3.q_lora_rank, v3.norm_topk_prob, v3.num_nextn_predict_layers, v3.rope_scaling) == (1536, True, 1, None)
    assert config_from_hf({"model_type": "kimi_k2"}) == v3
    v2 = config_from_hf({"model_type": "deepseek_v2", "num_experts_per_tok": 6})
    assert (v2.routed_scaling_factor, v2.n_group, v2.moe_intermediate_size, v2.q_lora_rank) == (1.0, 1, 1407, 1536)
    assert (v2.norm_topk_prob, v2.num_nextn_predict_layers, v2.bos_token_id) == (False, 0, 1)
    with pytest.raises(ConfigError, match="num_experts_per_tok"):
        config_from_hf({"model_type": "deepseek_v2"})


def test_null_and_second_names_mean_what_they_mean_in_transformers() -> None:
    config = config_from_hf({**V3, "q_lora_rank": None, "norm_topk_prob": None, "num_key_value_heads": None})
    assert (config.q_lora_rank, config.norm_topk_prob) == (None, False)
    others = {key: value for key, value in V3.items() if key not in ("num_nextn_predict_layers", "n_routed_experts")}
    config = config_from_hf({**others, "num_mtp_layers": 0, "num_local_experts": 64})
    assert (config.num_nextn_predict_layers, config.n_routed_experts) == (0, 64)
    with pytest.raises(WeightsError, match=r"num_mtp_layers: must equal num_nextn_predict_layers \(1\) \(got 0\)"):
        config_from_hf({**V3, "num_mtp_layers": 0})
    assert config_from_hf({**V3, "eos_token_id": [1, 128803]}).eos_token_id == 1
    greedy = config_from_hf({**V2, "topk_method": "greedy"})
    assert (greedy.n_group, greedy.topk_group) == (1, 1), "greedy selection ignores groups"
    assert config_from_hf({**V3, "num_hidden_layers": 2}).first_k_dense_replace == 2


YARN = {"rope_type": "yarn", "factor": 4.0}


def test_the_rope_that_counts_is_transformers_one() -> None:
    plain = {key: value for key, value in V3.items() if key not in ("rope_scaling", "rope_theta")}
    config = config_from_hf({**plain, "rope_theta": 5.0, "rope_parameters": {"rope_theta": 7.0}})
    assert (config.rope_theta, config.rope_scaling) == (7.0, None)
    assert config_from_hf({**plain, "rope_theta": 5.0, "rope_parameters": {}}).rope_theta == 5.0
    config = config_from_hf({**plain, "rope_scaling": YARN, "rope_parameters": {**YARN, "factor": 9.0}})
    assert config.rope_scaling is not None
    assert (config.rope_theta, config.rope_scaling.factor) == (10000.0, 4.0)
    # Left out: the length is the model's own, and mscale_all_dim corrects nothing.
    assert config.rope_scaling.original_max_position_embeddings == 163840
    assert config.softmax_scale == pytest.approx(192**-0.5)
    assert config.rope_scaling.rotary_factor == pytest.approx(1.138629, abs=1e-6)  # 0.1 ln 4 + 1
    given_factor = config_from_hf({**plain, "rope_scaling": {**YARN, "attention_factor": 1.3, "truncate": None}})
    assert given_factor.rope_scaling is not None
    assert (given_factor.rope_scaling.rotary_factor, given_factor.rope_scaling.truncate) == (1.3, False)
    implied = config_from_hf(
        {**plain, "rope_scaling": {**YARN, "factor": None, "original_max_position_embeddings": 4096}}
    )
    assert implied.rope_scaling is not None
    assert implied.rope_scaling.factor == 40.0


@pytest.mark.parametrize(
    ("base", "key", "value", "facts"),
    [
        (V3, "attention_bias", True, "must be false (got True)"),
        (V3, "hidden_act", "gelu", "must be \"silu\" (got 'gelu')"),
        (V3, "moe_layer_freq", 2, "must be 1 (got 2)"),
        (V3, "ep_size", 8, "must be 1"),
        (V3, "tie_word_embeddings", True, "must be false"),
        (V3, "rope_interleave", False, "must be true"),
        (V3, "attention_dropout", 0.1, "must be 0.0"),
        (V3, "scoring_func", "softmax", 'must be "sigmoid"'),
        (V3, "topk_method", "greedy", 'must be "noaux_tc"'),
        (V3, "index_topk", 2048, "sparse attention (DSA) is not supported"),
        (V3, "sliding_window", 4096, "unknown key"),
        (V3, "num_key_value_heads", 8, "must equal num_attention_heads (128) (got 8)"),
        (V3, "head_dim", 128, "must equal qk_rope_head_dim (64)"),
        (V3, "qk_head_dim", 64, "must equal qk_nope_head_dim + qk_rope_head_dim (192)"),
        (V3, "partial_rotary_factor", 0.5, "must be 1.0"),
        (V3, "rope_scaling", "yarn", "must be an object or null (got 'yarn')"),
        (V3, "rope_parameters", [1], "must be an object or null"),
        (V3, "eos_token_id", [], "at least one"),
        (V3, "quantization_config", "fp8", "must be an object or null"),
        (V2, "mlp_bias", True, "must be false"),
        (V2, "topk_method", None, '"greedy" or "group_limited_greedy"'),
        (V2, "scoring_func", "sigmoid", 'must be "softmax"'),
        (V2, "norm_topk_prob", True, "must be false with softmax scores"),
        (V3, "rope_theta", None, "(got None)"),
        (V3, "n_shared_experts", None, "(got None)"),
        (V3, "n_group", None, "(got None)"),
        (V3, "bos_token_id", None, "(got None)"),
        (V3, "num_nextn_predict_layers", 2, "(got 2)"),
    ],
)
def test_what_cannot_be_followed_is_refused_by_name(base: dict[str, Any], key: str, value: object, facts: str) -> None:
    with pytest.raises((WeightsError, ConfigError)) as caught:
        config_from_hf({**base, key: value}, "x/config.json")
    line = next(line for line in str(caught.value).splitlines() if line.startswith(f"  {key}: "))
    assert facts in line
    assert str(caught.value).startswith("x/config.json")


@pytest.mark.parametrize(
    ("rope", "facts"),
    [
        ({"rope_type": "linear", "factor": 2.0}, "rope_scaling.rope_type: must be default or yarn (got 'linear')"),
        ({"type": "deepseek_yarn", "factor": 2.0}, "rope_scaling.type: must be default or yarn"),
        ({"rope_type": "default", "factor": 2.0}, "rope_scaling.factor: unknown key of rope_type default"),
        ({**YARN, "attn_factor": 1.0}, "rope_scaling.attn_factor: unknown key of rope_type yarn"),
        ({**YARN, "partial_rotary_factor": 0.5}, "rope_scaling.partial_rotary_factor: must be 1.0"),
        ({"rope_type": "yarn"}, "rope_scaling.factor: is required"),
        ({**YARN, "factor": "4"}, "rope_scaling.factor: "),
        ({**YARN, "beta_fast": "32"}, "rope_scaling.beta_fast: "),
        ({**YARN, "original_max_position_embeddings": None}, "rope_scaling.original_max_position_embeddings: "),
        ({**YARN, "rope_theta": 1.0}, "rope_theta: must be above 1 with YaRN"),
        ({**YARN, "rope_theta": None}, "rope_theta: "),
    ],
)
def test_a_rope_that_cannot_be_followed_is_refused_by_name(rope: dict[str, Any], facts: str) -> None:
    with pytest.raises((WeightsError, ConfigError)) as caught:
        config_from_hf({**V3, "rope_scaling": rope}, "x/config.json")
    assert facts in str(caught.value)


@pytest.mark.parametrize("key", ["weight_block_size", "fmt", "activation_scheme"])
def test_other_fp8_than_the_release_s_blocks_is_refused(key: str) -> None:
    other = {"weight_block_size": [64, 64], "fmt": "e5m2", "activation_scheme": "static"}[key]
    with pytest.raises(WeightsError, match=rf"quantization_config\.{key}: must be "):
        config_from_hf({**V3, "quantization_config": {**V3["quantization_config"], key: other}})
    with pytest.raises(WeightsError, match=r"weight_block_size: must be \[128, 128\] \(got None\)"):
        config_from_hf({**V3, "quantization_config": {"quant_method": "fp8"}})


@pytest.mark.parametrize("model_type", ["deepseek_v32", "glm4_moe_lite", "deepseek_v4", None, ["deepseek_v3"]])
def test_other_architectures_are_refused_by_their_model_type(model_type: object) -> None:
    with pytest.raises(WeightsError, match=r"x/config\.json: model_type: must be one of deepseek_v3") as caught:
        config_from_hf({**V3, "model_type": model_type}, "x/config.json")
    assert repr(model_type) in str(caught.value)


@pytest.mark.parametrize("raw", [None, [], [1], "x", 3, {"model_type": "kimi_k25", "text_config": None}])
def test_a_file_that_is_no_object_is_refused(raw: object) -> None:
    with pytest.raises(WeightsError, match=r"x/config\.json.*must be a JSON object"):
        config_from_hf(raw, "x/config.json")


def test_all_problems_are_listed_at_once() -> None:
    raw = {**hf_config(ModelConfig(**PRESETS["tiny"])), "hidden_act": "gelu", "attention_bias": True}
    raw["rope_scaling"] = {"rope_type": "linear", "factor": 2.0}
    with pytest.raises(WeightsError) as caught:
        config_from_hf(raw, "x/config.json")
    for part in ("x/config.json", "hidden_act", "attention_bias", "rope_type"):
        assert part in str(caught.value)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.just(10**400) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)
ROPE_KEYS = [*V3["rope_scaling"], "rope_type", "rope_theta", "attention_factor", "truncate", "partial_rotary_factor"]
KEYS = [*V3, *V2, *GIGACHAT, "num_mtp_layers", "num_local_experts", "num_experts", "index_topk", "mlp_bias", "x"]


@settings(deadline=None, max_examples=400)
@given(
    base=st.sampled_from([V3, V2, GIGACHAT]),
    changes=st.dictionaries(st.sampled_from(KEYS), JSON, max_size=4),
    rope=st.dictionaries(st.sampled_from(ROPE_KEYS), JSON, max_size=4),
)
def test_any_json_is_read_or_refused_with_the_file_and_a_key(
    base: dict[str, Any], changes: dict[str, Any], rope: dict[str, Any]
) -> None:
    raw = {**base, **changes}
    if rope:
        raw["rope_scaling"] = {**V3["rope_scaling"], **rope}
    try:
        config = config_from_hf(raw, "x/config.json")
    except (WeightsError, ConfigError) as error:
        text = str(error)
        assert text.startswith("x/config.json")
        assert any(key in text for key in (*changes, *rope, "rope_", "num_key_value_heads", "head_dim"))
    else:
        assert config_from_hf(hf_config(config)) == config
