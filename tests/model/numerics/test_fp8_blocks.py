"""The released fp8 format: partial blocks, scales in other files, and what happens without them."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from base import storage
from base.errors import WeightsError
from model.model_config import ModelConfig
from model.numerics.formats import is_projection
from model.numerics.fp8_blocks import dequantize_blocks, quantize_blocks, scale_shape
from model.quantize import quantize_folder
from model.transformer import DeepseekV3
from model.weights.pretrained import (
    WeightsReader,
    hf_config,
    load_into,
    load_pretrained,
    read_model_config,
    save_pretrained,
    state_to_hf,
    write_index,
)
from model.weights.safetensors_file import write_file


def by_hand(weight: Tensor, scales: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Block by block, with the release's scale, amax / 448, or with given ones."""
    scale = torch.zeros(scale_shape(weight.shape))
    values = torch.empty_like(weight, dtype=torch.float8_e4m3fn)
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            block = slice(128 * i, 128 * (i + 1)), slice(128 * j, 128 * (j + 1))
            scale[i, j] = weight[block].abs().max() / 448 if scales is None else scales[i, j]
            values[block] = (weight[block] / scale[i, j]).to(torch.float8_e4m3fn)
    return values, scale


def same(ours: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor]) -> bool:
    return torch.equal(ours[0].view(torch.uint8), theirs[0].view(torch.uint8)) and torch.equal(ours[1], theirs[1])


@pytest.fixture
def release(tmp_path: Path, make_config: Callable[..., ModelConfig], make_model: Callable[..., DeepseekV3]) -> str:
    """A folder like the release: fp8 projections in one file, scales and all the rest in another."""
    uri = str(tmp_path / "release")
    model = make_model(make_config(hidden_size=160, moe_intermediate_size=136))
    weights: dict[str, Tensor] = {}
    rest: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        for hf_name, part in state_to_hf(name, tensor, model.config):
            if is_projection(hf_name):
                weights[hf_name], rest[hf_name + "_scale_inv"] = by_hand(part)
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
    values, scale = by_hand(weight)
    assert scale.shape == (2, 3)
    result = dequantize_blocks(values, scale)
    assert result[199, 299] == values[199, 299].float() * scale[1, 2]
    assert result[127, 128] == values[127, 128].float() * scale[0, 1]
    # e4m3 has 3 bits after the point: half a step is 1/16 of a value.
    assert ((result - weight).abs() <= weight.abs() / 16 + scale.max() * 2**-9).all()


@pytest.mark.parametrize("shape", [(256, 384), (200, 300), (1, 5), (129, 128)])
def test_trained_weights_get_the_release_s_own_scales(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape) * 0.02
    assert same(quantize_blocks(weight), by_hand(weight))


def test_what_came_from_blocks_goes_back_into_the_same_ones() -> None:
    """Scales that are exactly amax / 448 come back by themselves; those one unit beside it (division on a GPU is not
    always exact) would not: amax / 448 is another number then in every tenth block."""
    torch.manual_seed(5)
    weight = torch.randn(128 * 16, 128 * 8) * 0.02
    exact = by_hand(weight)
    assert same(quantize_blocks(dequantize_blocks(*exact)), exact)
    for to in (0.0, math.inf):
        beside = by_hand(weight, exact[1].nextafter(torch.full_like(exact[1], to)))
        plain = dequantize_blocks(*beside)
        assert (plain.view(16, 128, 8, 128).abs().amax((1, 3)) / 448 != beside[1]).sum() > 3
        assert same(quantize_blocks(plain), beside)


@pytest.mark.parametrize("kind", ["powers of two", "any"])
def test_scales_that_are_not_amax_over_448_lose_nothing_either(kind: str) -> None:
    torch.manual_seed(3)
    scale = 2.0 ** torch.randint(-14, -6, (4, 5)) if kind == "powers of two" else torch.rand(4, 5) * 1e-3 + 1e-6
    values = (torch.randn(500, 600) * 50).clamp(-448, 448).to(torch.float8_e4m3fn)
    exact = dequantize_blocks(values, scale)
    again = quantize_blocks(exact)
    assert torch.equal(dequantize_blocks(*again), exact)
    assert same(quantize_blocks(dequantize_blocks(*again)), again)


def test_a_block_of_zeros_stays_zeros() -> None:
    weight = torch.zeros(130, 130)
    weight[129, 129] = 1e-30
    values, scale = quantize_blocks(weight)
    assert torch.equal(scale[:1], torch.ones(1, 2))
    assert dequantize_blocks(values, scale).isfinite().all()
    assert dequantize_blocks(values, scale)[129, 129] == pytest.approx(1e-30)


def export(model: DeepseekV3, uri: str, dtype: torch.dtype) -> None:
    tensors = [pair for name, value in model.state_dict().items() for pair in state_to_hf(name, value, model.config)]
    save_pretrained(tensors, uri, model.config, dtype=dtype, max_shard_bytes=200_000)


def plain(uri: str) -> DeepseekV3:
    """The folder's weights, dequantized, as training loads them."""
    model = DeepseekV3(read_model_config(uri)[0])
    load_into(model, uri)
    return model.eval()


def stored(uri: str) -> dict[str, Tensor]:
    reader = WeightsReader(uri)
    return {name: reader.read(name) for name in reader.names}


def test_the_release_comes_back_byte_for_byte(release: str, tmp_path: Path) -> None:
    """fp8 with scales -> fp32 parameters -> fp8: same values, scales, types and configuration."""
    export(plain(release), str(tmp_path / "again"), torch.float8_e4m3fn)
    ours, theirs = stored(str(tmp_path / "again")), stored(release)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        if value.dtype == torch.float8_e4m3fn:
            assert torch.equal(value.view(torch.uint8), theirs[name].view(torch.uint8)), name
        else:
            assert torch.equal(value, theirs[name].to(value.dtype)), name
        kind = "fp8" if is_projection(name) else "fp32" if name.endswith(("_scale_inv", "correction_bias")) else "bf16"
        assert value.dtype == {"fp8": torch.float8_e4m3fn, "fp32": torch.float32, "bf16": torch.bfloat16}[kind], name
    config = storage.read_json(storage.join(str(tmp_path / "again"), "config.json"))
    assert config["torch_dtype"] == "bfloat16"
    assert config["quantization_config"] == {
        "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128],
    }  # fmt: skip


def test_bf16_comes_back_byte_for_byte(
    tmp_path: Path, make_config: Callable[..., ModelConfig], make_model: Callable[..., DeepseekV3]
) -> None:
    export(make_model(make_config()), str(tmp_path / "first"), torch.bfloat16)
    export(load_pretrained(str(tmp_path / "first"), dtype=torch.float32), str(tmp_path / "second"), torch.bfloat16)
    files = [name for name in storage.list_names(str(tmp_path / "first")) if name != storage.MARKER]
    assert sum(name.endswith(".safetensors") for name in files) > 1
    for name in files:
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes(), name


@pytest.mark.slow
def test_transformers_reads_our_blocks(
    tmp_path: Path, make_config: Callable[..., ModelConfig], make_model: Callable[..., DeepseekV3],
    make_tokens: Callable[..., Tensor],
) -> None:  # fmt: skip
    transformers = pytest.importorskip("transformers")
    uri = str(tmp_path / "fp8")
    export(
        make_model(make_config(hidden_size=256, moe_intermediate_size=128, q_lora_rank=128)), uri, torch.float8_e4m3fn
    )
    ours = load_pretrained(uri, dtype=torch.float32)
    plain = transformers.FineGrainedFP8Config(dequantize=True)
    theirs = transformers.DeepseekV3ForCausalLM.from_pretrained(uri, dtype=torch.float32, quantization_config=plain)
    tokens = make_tokens(ours.config, 1, 20)
    with torch.no_grad():
        difference = theirs.float()(tokens).logits - ours.logits(ours(tokens).hidden_BTD)
    assert difference.abs().max() < 1e-3


def test_the_release_loads_dequantized(
    release: str, make_model: Callable[..., DeepseekV3], make_tokens: Callable[..., Tensor]
) -> None:
    model = plain(release)
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
