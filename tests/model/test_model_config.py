"""Model configuration: parameters and FLOPs against published values and the module on meta, and impossible shapes."""

import pytest
import torch
from torch import nn

from base.errors import ConfigError
from model.attention import Attention
from model.experts import Experts
from model.model_config import PRESETS, ModelConfig
from model.transformer import DeepseekV3


def on_meta(preset: str) -> tuple[ModelConfig, DeepseekV3]:
    config = ModelConfig(**PRESETS[preset])
    with torch.device("meta"):
        return config, DeepseekV3(config)


def size(module: nn.Module) -> int:
    """Parameters and stored buffers: the released files hold the selection bias."""
    return sum(tensor.numel() for tensor in module.state_dict().values())


@pytest.mark.parametrize(
    ("preset", "total", "active", "matmul", "attention", "expert", "moe_layer"),
    [
        ("671b", 671_026_419_200, 37_552_282_624, 36_625_603_584, 187_107_328, 44_040_192, 11_507_286_272),
        ("16b", 15_706_484_224, 2_661_150_208, 2_451_435_008, 13_763_072, 8_650_752, 584_847_872),
    ],
)
def test_parameters_are_the_published_ones(
    preset: str, total: int, active: int, matmul: int, attention: int, expert: int, moe_layer: int
) -> None:
    config, model = on_meta(preset)
    mtp = size(model.mtp) if model.mtp else 0
    assert config.parameters() == size(model) - mtp == total
    assert config.parameters(with_mtp=True) == size(model)
    assert config.active_parameters() == active
    assert config.matmul_parameters() == matmul
    last = model.layers[-1]
    assert isinstance(last.self_attn, nn.Module)
    assert config.attention_parameters() == size(last.self_attn) == attention
    moe = model.moe_layers()[0]
    assert config.expert_parameters() == size(moe.experts) // config.n_routed_experts == expert
    assert config.layer_parameters(moe=True) == size(last) == moe_layer


def test_mtp_module_of_the_671b_release() -> None:
    config, model = on_meta("671b")
    assert model.mtp is not None
    assert config.mtp_parameters() == size(model.mtp)
    assert config.mtp_parameters() / 1e9 == pytest.approx(11.61, abs=0.005)


def matmul_weights(model: nn.Module, config: ModelConfig) -> float:
    """Weights that one token is multiplied with, found in the module itself."""
    total = 0.0
    for module in model.modules():
        if isinstance(module, nn.Linear):
            total += module.weight.numel()
        elif isinstance(module, Experts):
            total += size(module) * config.num_experts_per_tok / config.n_routed_experts
    return total


@pytest.mark.parametrize(("preset", "causal", "full"), [("671b", 250.5, 281.2), ("16b", 16.407, 18.106)])
def test_flops_at_4096_from_configuration_and_module(preset: str, causal: float, full: float) -> None:
    config, model = on_meta(preset)
    assert config.flops_per_token(4096) / 1e9 == pytest.approx(causal, abs=0.05)
    assert config.flops_per_token(4096, causal=False) / 1e9 == pytest.approx(full, abs=0.05)
    model.mtp = None
    heads = sum(module.heads for module in model.modules() if isinstance(module, Attention))
    widths = config.qk_head_dim + config.v_head_dim
    counted = 6 * matmul_weights(model, config) + 0.5 * 6 * heads * widths * 4096
    assert config.flops_per_token(4096) == pytest.approx(counted, rel=1e-4)


def test_flops_with_the_mtp_module() -> None:
    config = ModelConfig(**PRESETS["671b"])
    assert config.flops_per_token(4096, with_mtp=True) / 1e9 == pytest.approx(260.6, abs=0.4)


def test_softmax_scale_with_and_without_yarn() -> None:
    release = PRESETS["671b"]
    assert ModelConfig(**release).softmax_scale == pytest.approx(0.135234, abs=1e-6)
    assert ModelConfig(**{**release, "rope_scaling": None}).softmax_scale == pytest.approx(0.072169, abs=1e-6)


def test_impossible_shapes_are_refused_together() -> None:
    from base.config import validate

    raw = {**PRESETS["tiny"], "n_routed_experts": 9, "num_experts_per_tok": 7, "qk_rope_head_dim": 15}
    with pytest.raises(ConfigError) as caught:
        validate(raw, ModelConfig, origin="test")
    for key in ("n_routed_experts", "num_experts_per_tok", "qk_rope_head_dim"):
        assert key in str(caught.value)
