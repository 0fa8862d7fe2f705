"""Whole models in every format: the loaded model computes what the dequantized weights do, and libraries read it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme, QuantizationStatus
from compressed_tensors.utils.match import match_name
from torch import Tensor

from base import storage
from model.model_config import ModelConfig
from model.numerics.formats import FORMATS, is_projection
from model.numerics.modules import QuantizedExperts, QuantizedLinear
from model.numerics.scheme_format import SchemeFormat
from model.quantize import plan_groups
from model.transformer import DeepseekV3
from model.weights.pretrained import (
    WeightsReader,
    load_into,
    load_pretrained,
    read_model_config,
    save_pretrained,
    state_to_hf,
)

MakeTokens = Callable[..., Tensor]

QUANTIZED = [name for name in FORMATS if name != "bf16"]
COMPRESSED = [name for name in QUANTIZED if name != "fp8"]


def described(uri: str) -> QuantizationConfig:
    """The folder's quantization_config, as compressed-tensors parses it: unknown keys are refused."""
    return QuantizationConfig.model_validate(storage.read_json(storage.join(uri, "config.json"))["quantization_config"])


def stored_of(reader: WeightsReader, name: str) -> dict[str, Tensor]:
    """Stored tensors of one weight, by suffix."""
    return {key.removeprefix(name): reader.read(key) for key in reader.names if key.startswith(name)}


def dequantized(uri: str, format_name: str, config: ModelConfig) -> dict[str, Tensor]:
    """All weights of a folder, dequantized by the format itself, group by group."""
    quantization, reader = FORMATS[format_name].load(config), WeightsReader(uri)
    weights: dict[str, Tensor] = {}
    for name in reader.names:
        stem, leaf, _ = name.rpartition(".weight")
        if not is_projection(stem + leaf):
            weights[name] = reader.read(name)
        elif stem + leaf not in weights:
            stored = {stem + leaf + key: tensor for key, tensor in stored_of(reader, stem + leaf).items()}
            assert isinstance(quantization, SchemeFormat)
            scheme = quantization.scheme(stem + leaf)
            assert scheme is not None
            ((name, restore),) = quantization.restorers(stored).items()
            weights[name] = torch.empty(scheme.shape(stored_of(reader, name)))
            restore(slice(0, len(weights[name])), weights[name])
    return weights


@pytest.mark.parametrize("name", QUANTIZED)
def test_the_model_computes_what_the_dequantized_weights_do(
    name: str, plain_folder: str, quantized_folders: dict[str, str], tmp_path: Path, make_tokens: MakeTokens
) -> None:
    model = load_pretrained(quantized_folders[name], dtype=torch.float32)
    weights = dequantized(quantized_folders[name], name, model.config)
    save_pretrained(weights.items(), str(tmp_path / "dense"), model.config, dtype=torch.float32)
    expected, original = (load_pretrained(uri, dtype=torch.float32) for uri in (str(tmp_path / "dense"), plain_folder))
    tokens = make_tokens(model.config, 2, 30)
    with torch.no_grad():
        ours, theirs, exact = (m.logits(m(tokens).hidden_BTD) for m in (model, expected, original))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(ours, exact, rtol=1e-5, atol=1e-5), "quantizing must change something"
    assert 0.001 < ((ours - exact).norm() / exact.norm()).item() < 0.5


@pytest.mark.parametrize("name", QUANTIZED)
def test_every_projection_is_kept_as_stored_also_of_the_mtp_module(
    name: str, quantized_folders: dict[str, str]
) -> None:
    model = load_pretrained(quantized_folders[name], dtype=torch.bfloat16)
    linears = {key for key, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    assert all(key.rpartition(".")[2] in ("gate", "eh_proj", "lm_head") for key in linears), linears
    experts = [module for module in model.modules() if isinstance(module, QuantizedExperts)]
    assert len(experts) == len(model.moe_layers())
    assert any(key.startswith("mtp.") for key, module in model.named_modules() if isinstance(module, QuantizedLinear))
    reader = WeightsReader(quantized_folders[name])
    prefix = "model.layers.1.mlp.experts.2."
    buffers = dict(model.layers[1].mlp.experts.named_buffers())  # type: ignore[union-attr,operator]
    for suffix, up in stored_of(reader, prefix + "up_proj.weight").items():
        buffer = buffers[f"stored_w13_EFD{suffix}"]
        assert buffer.dtype == up.dtype
        assert torch.equal(buffer[2].chunk(2)[1].view(torch.uint8), up.view(torch.uint8)), suffix


@pytest.mark.parametrize("name", COMPRESSED)
def test_compressed_tensors_finds_each_layer_s_scheme_and_its_weights(
    name: str, plain_folder: str, quantized_folders: dict[str, str]
) -> None:
    uri = quantized_folders[name]
    parsed, reader = described(uri), WeightsReader(uri)
    assert parsed.quantization_status == QuantizationStatus.COMPRESSED
    weights = dequantized(uri, name, read_model_config(uri)[0])
    for weight in WeightsReader(plain_folder).names:
        module = weight.removesuffix(".weight")
        if not module.endswith(("proj", "gate", "lm_head", "head", "with_mqa")):
            continue
        ignored = any(match_name(module, pattern) for pattern in parsed.ignore or [])
        assert ignored is not is_projection(weight), weight
        if ignored:
            continue
        found = [
            scheme
            for scheme in parsed.config_groups.values()
            if isinstance(scheme, QuantizationScheme)
            and any(target == "Linear" or match_name(module, target) for target in scheme.targets)
        ]
        assert len(found) == 1, weight
        library = BaseCompressor.get_value_from_registry(str(found[0].format))
        tensors = {f"weight{suffix}": tensor for suffix, tensor in stored_of(reader, weight).items()}
        theirs = library.decompress(tensors, found[0])["weight"]
        assert torch.equal(theirs, weights[weight].to(theirs.dtype)), weight


def test_a_mix_says_so_and_one_scheme_for_all_is_said_of_every_linear_layer(
    quantized_folders: dict[str, str],
) -> None:
    for name, layout, groups in (
        ("int8", "int-quantized", 1),
        ("fp8_channel", "float-quantized", 1),
        ("fp8_block", "float-quantized", 2),
        ("w4a16", "mixed-precision", 3),
        ("nvfp4", "mixed-precision", 3),
    ):
        parsed = described(quantized_folders[name])
        assert (parsed.format, len(parsed.config_groups)) == (layout, groups)
        targets = [target for scheme in parsed.config_groups.values() for target in scheme.targets]  # type: ignore[union-attr]
        assert (targets == ["Linear"]) is (groups == 1)


def test_gate_and_up_are_in_one_file_and_under_one_global_scale(
    plain_folder: str, quantized_folders: dict[str, str]
) -> None:
    before, after = WeightsReader(plain_folder), WeightsReader(quantized_folders["nvfp4"])
    experts = [
        [f"model.layers.1.mlp.experts.{expert}.{part}_proj.weight" for part in ("gate", "up", "down")]
        for expert in range(8)
    ]
    gate, up, down = next(names for names in experts if before.file_of(names[0]) is not before.file_of(names[1]))
    assert after.file_of(gate + "_packed") is after.file_of(up + "_packed")
    largest = max(before.read(name).abs().max().item() for name in (gate, up))
    scales = [after.read(f"{name}_global_scale").item() for name in (gate, up, down)]
    assert scales[0] == scales[1] == pytest.approx(448 * 6 / largest, rel=1e-6)
    assert scales[2] != scales[0]


@pytest.mark.parametrize("name", ["nvfp4", "w4a16", "fp8_block"])
def test_files_can_be_quantized_in_any_order(name: str, plain_folder: str, quantized_folders: dict[str, str]) -> None:
    whole, quantization = WeightsReader(quantized_folders[name]), FORMATS[name].load(read_model_config(plain_folder)[0])
    reader = WeightsReader(plain_folder)
    for file, groups in reversed(plan_groups(reader, quantization).items()):
        tensors: dict[str, Tensor] = {}
        for names in groups:
            weights = {key: reader.read(key) for key in names}
            tensors |= weights if quantization.group(names[0]) is None else quantization.quantize(weights)
        assert set(tensors) == (set(whole.names_in(file)) if groups else set())
        for key, tensor in tensors.items():
            assert torch.equal(tensor.view(torch.uint8), whole.read(key).view(torch.uint8)), key


def test_the_release_s_blocks_come_back_bit_for_bit(
    plain_folder: str, quantized_folders: dict[str, str], tmp_path: Path
) -> None:
    """Quantized to fp8, loaded plainly as training does, and exported in fp8 again."""
    uri = quantized_folders["fp8"]
    model = DeepseekV3(read_model_config(uri)[0])
    load_into(model, uri)
    named = [pair for key, value in model.state_dict().items() for pair in state_to_hf(key, value, model.config)]
    save_pretrained(named, str(tmp_path / "again"), model.config, dtype=torch.float8_e4m3fn)
    before, after = WeightsReader(uri), WeightsReader(str(tmp_path / "again"))
    assert set(before.names) == set(after.names)
    for name in (name for name in before.names if is_projection(name.removesuffix("_scale_inv"))):
        assert torch.equal(before.read(name).view(torch.uint8), after.read(name).view(torch.uint8)), name
    described_again = storage.read_json(str(tmp_path / "again" / "config.json"))["quantization_config"]
    assert described_again == storage.read_json(storage.join(uri, "config.json"))["quantization_config"]
