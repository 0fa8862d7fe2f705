"""int8 weights: error bounds, the report, streaming, and the model that runs on them."""

import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationConfig, QuantizationStatus
from compressed_tensors.quantization.lifecycle.forward import dequantize as library_dequantize
from compressed_tensors.quantization.lifecycle.forward import quantize as library_quantize
from compressed_tensors.utils.match import is_match
from torch import Tensor

from base import storage
from base.errors import ConfigError, InvalidInputError, MissingFileError, WeightsError
from model.model_config import ModelConfig
from model.numerics.formats import is_projection
from model.numerics.int8_format import Int8Experts, Int8Linear, dequantize, quantize
from model.quantize import quantize_folder
from model.transformer import DeepseekV3
from model.weights.pretrained import WeightsReader, load_into, load_pretrained, save_pretrained, state_to_hf
from model.weights.safetensors_file import Box

MakeConfig = Callable[..., ModelConfig]
MakeModel = Callable[..., DeepseekV3]
MakeTokens = Callable[..., Tensor]


@pytest.fixture
def folder(tmp_path: Path, make_config: MakeConfig, make_model: MakeModel) -> str:
    model = make_model(make_config())
    named = (pair for name, tensor in model.state_dict().items() for pair in state_to_hf(name, tensor, model.config))
    uri = str(tmp_path / "export")
    save_pretrained(named, uri, model.config, dtype=torch.bfloat16, max_shard_bytes=30_000)
    return uri


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


def test_what_is_quantized_and_what_is_kept(folder: str) -> None:
    quantized = {name for name in WeightsReader(folder).names if is_projection(name)}
    kept = set(WeightsReader(folder).names) - quantized
    assert "model.layers.1.mlp.experts.3.up_proj.weight" in quantized
    assert "model.layers.3.self_attn.kv_a_proj_with_mqa.weight" in quantized
    assert "model.layers.0.mlp.down_proj.weight" in quantized
    assert all("_proj" in name for name in quantized)
    for part in ("embed_tokens", "lm_head", "norm", "mlp.gate.weight", "e_score_correction_bias", "eh_proj"):
        assert any(part in name for name in kept)
    assert not any("_proj" in name and "eh_proj" not in name for name in kept if "with_mqa" not in name)


def test_report_and_folder_agree(folder: str, tmp_path: Path) -> None:
    target, lines = str(tmp_path / "quantized"), list[tuple[str, float]]()
    report = quantize_folder(folder, target, lambda line, fraction: lines.append((line, fraction)))
    assert storage.is_committed(target)
    assert storage.read_json(storage.join(target, "quantization.json")) == report
    before, after = WeightsReader(folder), WeightsReader(target)
    assert [fraction for _, fraction in lines] == [(i + 1) / len(before.files) for i in range(len(before.files))]
    assert after.files == before.files
    assert {item["name"] for item in report["tensors"]} == {name for name in before.names if is_projection(name)}
    for name in before.names:
        if not is_projection(name):
            assert torch.equal(before.read(name), after.read(name)), name
    for item in report["tensors"]:
        weight = before.read(item["name"]).float()
        error = after.read(item["name"]) * after.read(item["name"] + "_scale") - weight
        assert item["shape"] == list(weight.shape)
        assert item["rel_error"] == pytest.approx((error.norm() / weight.norm()).item(), rel=1e-4)
        assert item["max_abs_error"] == pytest.approx(error.abs().max().item(), rel=1e-4)
        assert item["rel_error"] < 0.02
    for reader, key in ((before, "bytes_before"), (after, "bytes_after")):
        assert report[key] == sum(reader.info(name).stop - reader.info(name).start for name in reader.names)
    config = storage.read_json(storage.join(target, "config.json"))["quantization_config"]
    assert config["quant_method"] == "compressed-tensors"
    assert config["config_groups"]["group_0"]["weights"]["strategy"] == "channel"


def test_compressed_tensors_own_library_reads_the_configuration_and_the_weights(folder: str, tmp_path: Path) -> None:
    target = str(tmp_path / "quantized")
    quantize_folder(folder, target)
    written = storage.read_json(storage.join(target, "config.json"))["quantization_config"]
    read = QuantizationConfig.model_validate(written)  # schemes and their arguments refuse unknown keys
    assert (read.format, read.quantization_status) == ("int-quantized", QuantizationStatus.COMPRESSED)
    scheme = read.config_groups["group_0"]
    before, after = WeightsReader(folder), WeightsReader(target)
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


def test_projections_shrink_to_half_of_bf16_and_a_scale_per_row(folder: str, tmp_path: Path) -> None:
    quantize_folder(folder, str(tmp_path / "quantized"))
    before, after = WeightsReader(folder), WeightsReader(str(tmp_path / "quantized"))
    name = "model.layers.1.mlp.experts.0.up_proj.weight"
    assert after.info(name).dtype == torch.int8
    assert before.info(name).dtype == torch.bfloat16
    assert after.shape(name + "_scale") == (after.shape(name)[0], 1)


def test_no_more_than_one_shard_is_in_memory(folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: set[int] = set()
    most = 0
    plain = WeightsReader.read_box

    def counted(reader: WeightsReader, name: str, box: Box) -> Tensor:
        nonlocal most
        tensor = plain(reader, name, box)
        alive.add(id(tensor))
        weakref.finalize(tensor, alive.discard, id(tensor))
        most = max(most, len(alive))
        return tensor

    monkeypatch.setattr(WeightsReader, "read_box", counted)
    quantize_folder(folder, str(tmp_path / "quantized"))
    reader = WeightsReader(folder)
    largest = max(len(reader.names_in(file)) for file in reader.files)
    assert 0 < most <= largest < len(reader.names)


def test_the_int8_model_equals_the_model_of_dequantized_weights(
    folder: str, tmp_path: Path, make_tokens: MakeTokens
) -> None:
    target = str(tmp_path / "quantized")
    quantize_folder(folder, target)
    model = load_pretrained(target, dtype=torch.float32)
    plain = load_pretrained(folder, dtype=torch.float32)
    reader = WeightsReader(target)
    dense = {
        name: reader.read(name) * reader.read(f"{name}_scale") if is_projection(name) else reader.read(name)
        for name in WeightsReader(folder).names
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


def test_the_int8_model_keeps_int8_in_memory_and_fp32_scales_under_a_cast(folder: str, tmp_path: Path) -> None:
    target = str(tmp_path / "quantized")
    quantize_folder(folder, target)
    model = load_pretrained(target, dtype=torch.bfloat16)
    projection = model.layers[1].self_attn.o_proj  # type: ignore[union-attr]
    assert isinstance(projection, Int8Linear)
    assert projection.weight_int8.dtype == torch.int8
    assert projection.weight_scale.dtype == torch.float32
    assert projection.weight.dtype == torch.bfloat16
    assert model.half().layers[1].self_attn.o_proj.weight_scale.dtype == torch.float32  # type: ignore[union-attr]


def test_int8_weights_do_not_load_into_a_plain_model(folder: str, tmp_path: Path) -> None:
    target = str(tmp_path / "quantized")
    quantize_folder(folder, target)
    with pytest.raises(WeightsError, match=r"unexpected .*_scale"):
        load_into(load_pretrained(folder, dtype=torch.float32), target)


def test_a_quantized_or_identical_folder_is_refused(folder: str, tmp_path: Path) -> None:
    target = str(tmp_path / "quantized")
    quantize_folder(folder, target)
    with pytest.raises(WeightsError, match="quantized already"):
        quantize_folder(target, str(tmp_path / "again"))
    with pytest.raises(InvalidInputError, match="name another folder"):
        quantize_folder(folder, folder + "/")
    assert storage.is_committed(folder)


def test_a_truncated_source_leaves_the_target_without_a_marker(folder: str, tmp_path: Path) -> None:
    shard = sorted(Path(folder).glob("*.safetensors"))[-1]
    shard.write_bytes(shard.read_bytes()[:-3])
    with pytest.raises(WeightsError, match="truncated"):
        quantize_folder(folder, str(tmp_path / "quantized"))
    assert not storage.is_committed(str(tmp_path / "quantized"))


def test_as_a_program(folder: str, tmp_path: Path) -> None:
    def run(source: str, *options: str) -> Any:
        command = [sys.executable, "-m", "model.quantize", "--source", source, "--target", str(tmp_path / "quantized")]
        command += options
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)

    done = run(folder)
    assert done.returncode == 0, done.stderr
    assert "100% quantized" in done.stdout
    assert storage.is_committed(str(tmp_path / "quantized"))
    failed = run(str(tmp_path / "nowhere"))
    assert failed.returncode == MissingFileError.exit_code
    assert failed.stderr.startswith("error: ")
    assert "nowhere" in failed.stderr
    wrong = run(folder, "--format", "int3")
    assert wrong.returncode == ConfigError.exit_code
    assert "must be one of int8 (got 'int3')" in wrong.stderr
