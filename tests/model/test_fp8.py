"""The released fp8 format: partial blocks, scales in other files, and what happens without them."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from base import storage
from base.errors import WeightsError
from model.config import ModelConfig
from model.fp8 import dequantize_blocks, scale_shape
from model.quantize import is_quantized, quantize_folder
from model.safetensors_file import write_file
from model.transformer import DeepseekV3
from model.weights import WeightsReader, hf_config, load_pretrained, state_to_hf, write_index


def to_fp8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Block by block, with the release's scale: amax / 448."""
    scale = torch.zeros(scale_shape(weight.shape))
    values = torch.empty_like(weight, dtype=torch.float8_e4m3fn)
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            block = slice(128 * i, 128 * (i + 1)), slice(128 * j, 128 * (j + 1))
            scale[i, j] = weight[block].abs().max() / 448
            values[block] = (weight[block] / scale[i, j]).to(torch.float8_e4m3fn)
    return values, scale


@pytest.fixture
def release(tmp_path: Path, make_config: Callable[..., ModelConfig], make_model: Callable[..., DeepseekV3]) -> str:
    """A folder like the release: fp8 projections in one file, scales and all the rest in another."""
    uri = str(tmp_path / "release")
    model = make_model(make_config(hidden_size=160, moe_intermediate_size=136))
    weights: dict[str, Tensor] = {}
    rest: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        for hf_name, part in state_to_hf(name, tensor, model.config):
            if is_quantized(hf_name):
                weights[hf_name], rest[hf_name + "_scale_inv"] = to_fp8(part)
            else:
                rest[hf_name] = part.clone()
    write_file(storage.join(uri, "model-00001-of-00002.safetensors"), weights)
    write_file(storage.join(uri, "model-00002-of-00002.safetensors"), rest)
    files = dict.fromkeys(weights, "model-00001-of-00002.safetensors")
    write_index(uri, files | dict.fromkeys(rest, "model-00002-of-00002.safetensors"))
    quantization = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
    storage.write_json(
        storage.join(uri, "config.json"), hf_config(model.config) | {"quantization_config": quantization}
    )
    return uri


def test_partial_blocks() -> None:
    assert scale_shape((576, 7168)) == (5, 56)
    weight = torch.randn(200, 300) * 3
    values, scale = to_fp8(weight)
    assert scale.shape == (2, 3)
    result = dequantize_blocks(values, scale)
    assert result[199, 299] == values[199, 299].float() * scale[1, 2]
    assert result[127, 128] == values[127, 128].float() * scale[0, 1]
    # e4m3 has 3 bits after the point: half a step is 1/16 of a value.
    assert ((result - weight).abs() <= weight.abs() / 16 + scale.max() * 2**-9).all()


def test_the_release_loads_dequantized(
    release: str, make_model: Callable[..., DeepseekV3], make_tokens: Callable[..., Tensor]
) -> None:
    model = load_pretrained(release, dtype=torch.float32)
    original = make_model(model.config)
    weight, exact = model.moe_layers()[1].experts.w13_EFD, original.moe_layers()[1].experts.w13_EFD
    assert 0.005 < ((weight - exact).norm() / exact.norm()).item() < 0.04
    assert torch.equal(model.lm_head.weight, original.lm_head.weight)
    assert model(make_tokens(model.config, 1, 8)).hidden_BTD.isfinite().all()


def test_the_release_quantizes_to_int8(release: str, tmp_path: Path) -> None:
    report = quantize_folder(release, str(tmp_path / "int8"))
    reader = WeightsReader(str(tmp_path / "int8"))
    assert not any(name.endswith("_scale_inv") for name in reader.names)
    assert report["worst_rel_error"] < 0.02
    assert storage.read_json(str(tmp_path / "int8" / "config.json"))["quantization_config"]["quant_method"] != "fp8"


def test_fp8_without_its_scales_is_refused(release: str) -> None:
    path = storage.join(release, "model-00002-of-00002.safetensors")
    reader = WeightsReader(release)
    name = "model.layers.0.mlp.down_proj.weight"
    held = {key: reader.read(key).clone() for key in reader.names_in("model-00002-of-00002.safetensors")}
    held.pop(name + "_scale_inv")
    write_file(path, held)
    index = storage.read_json(storage.join(release, "model.safetensors.index.json"))["weight_map"]
    index.pop(name + "_scale_inv")
    write_index(release, index)
    with pytest.raises(WeightsError, match=r"layers\.0\.mlp\.down_proj\.weight .* needs .*_scale_inv .*got none"):
        load_pretrained(release, dtype=torch.float32)
