"""Released tensor names of model state entries, and the released config.json."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import torch

from base.errors import WeightsError
from model.model_config import PRESETS, ModelConfig
from model.numerics.formats import is_projection
from model.numerics.fp8_blocks import scale_shape
from model.transformer import DeepseekV3
from model.weights.hf_names import config_from_hf, hf_config, pieces, state_to_hf
from model.weights.reader import WeightsReader

MakeConfig = Callable[..., ModelConfig]
MakeModel = Callable[..., DeepseekV3]


def test_released_names_of_the_mtp_module(folder: str) -> None:
    reader = WeightsReader(folder)
    for tail in (
        "enorm.weight",
        "hnorm.weight",
        "eh_proj.weight",
        "shared_head.norm.weight",
        "embed_tokens.weight",
        "shared_head.head.weight",
        "mlp.gate.e_score_correction_bias",
        "mlp.experts.7.down_proj.weight",
        "self_attn.kv_a_proj_with_mqa.weight",
    ):
        assert f"model.layers.3.{tail}" in reader
    assert torch.equal(reader.read("model.layers.3.shared_head.head.weight"), reader.read("lm_head.weight"))


@pytest.mark.parametrize("preset", list(PRESETS))
def test_config_json_round_trip(preset: str) -> None:
    config = ModelConfig(**PRESETS[preset])
    raw = json.loads(json.dumps(hf_config(config)))
    assert config_from_hf(raw) == config
    assert raw["topk_method"] == ("greedy" if preset == "16b" else "noaux_tc")
    if preset == "671b":
        assert raw["rope_scaling"]["type"] == raw["rope_scaling"]["rope_type"] == "yarn"
        assert raw["rope_parameters"]["rope_theta"] == raw["rope_theta"] == 10000.0


def test_config_json_of_the_release_is_understood() -> None:
    """Keys and types as in the released file: integers where we have floats, a classic rope_scaling."""
    release = {**PRESETS["671b"], "model_type": "deepseek_v3", "rope_theta": 10000, "initializer_range": 0.02}
    release["rope_scaling"] = {
        "beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096, "type": "yarn",
    }  # fmt: skip
    release |= {"hidden_act": "silu", "topk_method": "noaux_tc", "rms_norm_eps": 1e-06, "moe_layer_freq": 1}
    config = config_from_hf(release)
    assert config.softmax_scale == pytest.approx(0.135234, abs=1e-6)
    assert config == ModelConfig(**{**PRESETS["671b"], "initializer_range": 0.02})


def test_a_foreign_config_is_refused_with_every_reason() -> None:
    raw = {**hf_config(ModelConfig(**PRESETS["tiny"])), "hidden_act": "gelu", "attention_bias": True}
    raw["rope_scaling"] = {"rope_type": "linear", "factor": 2.0}
    with pytest.raises(WeightsError) as caught:
        config_from_hf(raw, "x/config.json")
    for part in ("x/config.json", "hidden_act", "attention_bias", "rope_type"):
        assert part in str(caught.value)


def test_every_stored_tensor_of_671b_has_its_place() -> None:
    """On meta: the release's own count of tensors, and shapes that block scales fit."""
    config = ModelConfig(**PRESETS["671b"])
    with torch.device("meta"):
        state = DeepseekV3(config).state_dict()
    stored = [(n, tuple(t.shape)) for name, tensor in state.items() for n, t in state_to_hf(name, tensor, config)]
    shapes = dict(stored)
    assert len(shapes) == len(stored)
    projections = [name for name in shapes if is_projection(name)]
    # Three dense layers and 58 + 1 mixture layers: 5 projections of attention, 3 of each expert or dense layer.
    assert len(projections) == 62 * 5 + 3 * 3 + 59 * 257 * 3
    # weight_map of the released index has so many names, scales among them.
    assert len(shapes) + len(projections) == 91_991
    layers = {int(name.split(".")[2]) for name in shapes if name.startswith("model.layers.")}
    assert layers == set(range(62))
    assert shapes["model.layers.61.eh_proj.weight"] == (7168, 14336)
    assert scale_shape(shapes["model.layers.61.self_attn.kv_a_proj_with_mqa.weight"]) == (5, 56)
    assert shapes["model.layers.3.mlp.experts.255.down_proj.weight"] == (7168, 2048)
    assert shapes["model.layers.60.self_attn.kv_b_proj.weight"] == (128 * 256, 512)
    assert sum(1 for name, tensor in state.items() for _ in pieces(name, tensor.shape, config)) == len(shapes) - 2
