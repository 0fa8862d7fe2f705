"""Kinds of projections: every released name of a model has one, or is known to have none."""

from collections.abc import Callable

import pytest
import torch

from model.model_config import ModelConfig
from model.numerics.weight_kinds import Kind, kind_of, layer_of
from model.transformer import DeepseekV3
from model.weights.hf_names import state_to_hf

PLAIN = ("norm", "embed_tokens", "lm_head", "shared_head", "mlp.gate.", "eh_proj")


@pytest.mark.parametrize("q_lora_rank", [24, None])
def test_every_weight_has_one_kind_or_is_known_to_have_none(
    q_lora_rank: int | None, make_config: Callable[..., ModelConfig]
) -> None:
    config = make_config(q_lora_rank=q_lora_rank)
    with torch.device("meta"):
        state = DeepseekV3(config).state_dict()
    names = [name for entry, tensor in state.items() for name, _ in state_to_hf(entry, tensor, config)]
    assert {kind_of(name) for name in names} == {None, *Kind}
    for name in names:
        assert (kind_of(name) is None) is any(part in name for part in PLAIN), name


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("model.layers.61.self_attn.kv_a_proj_with_mqa.weight", Kind.LATENT),
        ("model.layers.0.self_attn.q_proj.weight", Kind.ATTENTION),
        ("model.layers.0.mlp.up_proj.weight", Kind.DENSE),
        ("model.layers.9.mlp.shared_experts.down_proj.weight", Kind.SHARED),
        ("model.layers.9.mlp.experts.255.gate_proj.weight", Kind.ROUTED),
        ("model.layers.9.mlp.experts.255.gate_proj.weight_scale", None),
        ("model.layers.9.mlp.experts.gate_proj.weight", None),
        ("model.layers.9.self_attn.q_a_layernorm.weight", None),
    ],
)
def test_names(name: str, kind: Kind | None) -> None:
    assert kind_of(name) is kind


@pytest.mark.parametrize(
    ("name", "layer"), [("model.layers.61.mlp.gate.weight", 61), ("model.norm.weight", None), ("lm_head.weight", None)]
)
def test_layers(name: str, layer: int | None) -> None:
    assert layer_of(name) == layer
