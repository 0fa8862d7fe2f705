"""Released tensor names of model state entries."""

from __future__ import annotations

from collections.abc import Callable

import torch

from model.model_config import PRESETS, ModelConfig
from model.numerics.formats import is_projection
from model.numerics.fp8_blocks import scale_shape
from model.transformer import DeepseekV3
from model.weights.hf_names import pieces, state_to_hf
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
