"""int8 weights with a scale per channel: error bounds, compressed-tensors' reading of them, and the model they run."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from compressed_tensors.quantization import QuantizationConfig, QuantizationStatus
from compressed_tensors.quantization.lifecycle.forward import dequantize as library_dequantize
from compressed_tensors.quantization.lifecycle.forward import quantize as library_quantize
from compressed_tensors.utils.match import is_match
from torch import Tensor

from base import storage
from base.errors import WeightsError
from model.model_config import ModelConfig
from model.numerics.formats import is_projection
from model.numerics.int8_format import Int8Experts, Int8Linear, dequantize, quantize
from model.quantize import quantize_folder
from model.transformer import DeepseekV3
from model.weights.pretrained import WeightsReader, load_into, load_pretrained, save_pretrained

MakeConfig = Callable[..., ModelConfig]
MakeModel = Callable[..., DeepseekV3]
MakeTokens = Callable[..., Tensor]


def test_the_error_is_at_most_half_a_scale_in_every_channel() -> None:
    weight = torch.randn(64, 300) * torch.logspace(-4, 3, 64)[:, None]
    weight[7] = 0.0
    values, scale = quantize(weight)
    assert values.dtype == torch.int8
    assert values.abs().max() == 127
    error = (dequantize(values, scale, torch.float32) - weight).abs()
    assert (error <= scale * 0.5001).all()
    assert torch.equal(values[7], torch.zeros(300, dtype=torch.int8))
    assert scale[7].item() == 1.0


def test_compressed_tensors_own_library_reads_the_configuration_and_the_weights(
    bf16_folder: str, tmp_path: Path
) -> None:
    target = str(tmp_path / "quantized")
    quantize_folder(bf16_folder, target)
    written = storage.read_json(storage.join(target, "config.json"))["quantization_config"]
    read = QuantizationConfig.model_validate(written)  # schemes and their arguments refuse unknown keys
    assert (read.format, read.quantization_status) == ("int-quantized", QuantizationStatus.COMPRESSED)
    scheme = read.config_groups["group_0"]
    before, after = WeightsReader(bf16_folder), WeightsReader(target)
    layers = [name for name in before.names if name.endswith("proj.weight") or name.startswith("lm_head")]
    assert any(is_projection(name) for name in layers)
    for name in layers:
        ignored = is_match(name.removesuffix(".weight"), torch.nn.Linear(1, 1), read.ignore)
        assert ignored is not is_projection(name), name
        if is_projection(name):
            values, scale = after.read(name), after.read(name + "_scale")
            theirs = library_dequantize(values, scale, args=scheme.weights)
            assert torch.equal(theirs, values * scale)
            no_shift = torch.zeros_like(scale, dtype=torch.int8)
            again = library_quantize(before.read(name).float(), scale, no_shift, scheme.weights, dtype=torch.int8)
            assert torch.equal(again, values)


def test_projections_shrink_to_half_of_bf16_and_a_scale_per_row(bf16_folder: str, tmp_path: Path) -> None:
    quantize_folder(bf16_folder, str(tmp_path / "quantized"))
    before, after = WeightsReader(bf16_folder), WeightsReader(str(tmp_path / "quantized"))
    name = "model.layers.1.mlp.experts.0.up_proj.weight"
    assert after.info(name).dtype == torch.int8
    assert before.info(name).dtype == torch.bfloat16
    assert after.shape(name + "_scale") == (after.shape(name)[0], 1)


def test_the_int8_model_equals_the_model_of_dequantized_weights(
    bf16_folder: str, tmp_path: Path, make_tokens: MakeTokens
) -> None:
    target = str(tmp_path / "quantized")
    quantize_folder(bf16_folder, target)
    model = load_pretrained(target, dtype=torch.float32)
    plain = load_pretrained(bf16_folder, dtype=torch.float32)
    reader = WeightsReader(target)
    dense = {
        name: reader.read(name) * reader.read(f"{name}_scale") if is_projection(name) else reader.read(name)
        for name in WeightsReader(bf16_folder).names
    }
    save_pretrained(dense.items(), str(tmp_path / "dense"), plain.config, dtype=torch.float32)
    expected = load_pretrained(str(tmp_path / "dense"), dtype=torch.float32)
    tokens = make_tokens(plain.config, 2, 30)
    with torch.no_grad():
        ours, theirs = model.logits(model(tokens).hidden_BTD), expected.logits(expected(tokens).hidden_BTD)
        original = plain.logits(plain(tokens).hidden_BTD)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(ours, original, rtol=1e-5, atol=1e-5), "quantizing must change something"
    kinds = [type(module) for module in model.modules()]
    assert kinds.count(Int8Experts) == len(model.moe_layers())
    assert kinds.count(Int8Linear) > 20
    assert model.moe_layers()[0].gate.weight.dtype == torch.float32


def test_the_int8_model_keeps_int8_in_memory_and_fp32_scales_under_a_cast(bf16_folder: str, tmp_path: Path) -> None:
    target = str(tmp_path / "quantized")
    quantize_folder(bf16_folder, target)
    model = load_pretrained(target, dtype=torch.bfloat16)
    projection = model.layers[1].self_attn.o_proj  # type: ignore[union-attr]
    assert isinstance(projection, Int8Linear)
    assert projection.weight_int8.dtype == torch.int8
    assert projection.weight_scale.dtype == torch.float32
    assert projection.weight.dtype == torch.bfloat16
    assert model.half().layers[1].self_attn.o_proj.weight_scale.dtype == torch.float32  # type: ignore[union-attr]


def test_int8_weights_do_not_load_into_a_plain_model(bf16_folder: str, tmp_path: Path) -> None:
    target = str(tmp_path / "quantized")
    quantize_folder(bf16_folder, target)
    with pytest.raises(WeightsError, match=r"unexpected .*_scale"):
        load_into(load_pretrained(bf16_folder, dtype=torch.float32), target)
