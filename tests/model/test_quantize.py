"""Quantization of a folder: what is quantized, the report, memory of one shard, refusals, and the command."""

import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from base import storage
from base.errors import ConfigError, InvalidInputError, MissingFileError, WeightsError
from model.model_config import ModelConfig
from model.numerics.formats import is_projection
from model.quantize import quantize_folder
from model.transformer import DeepseekV3
from model.weights.pretrained import WeightsReader
from model.weights.safetensors_file import Box

MakeConfig = Callable[..., ModelConfig]
MakeModel = Callable[..., DeepseekV3]
MakeTokens = Callable[..., Tensor]


def test_what_is_quantized_and_what_is_kept(bf16_folder: str) -> None:
    quantized = {name for name in WeightsReader(bf16_folder).names if is_projection(name)}
    kept = set(WeightsReader(bf16_folder).names) - quantized
    assert "model.layers.1.mlp.experts.3.up_proj.weight" in quantized
    assert "model.layers.3.self_attn.kv_a_proj_with_mqa.weight" in quantized
    assert "model.layers.0.mlp.down_proj.weight" in quantized
    assert all("_proj" in name for name in quantized)
    for part in ("embed_tokens", "lm_head", "norm", "mlp.gate.weight", "e_score_correction_bias", "eh_proj"):
        assert any(part in name for name in kept)
    assert not any("_proj" in name and "eh_proj" not in name for name in kept if "with_mqa" not in name)


def test_report_and_folder_agree(bf16_folder: str, tmp_path: Path) -> None:
    target, lines = str(tmp_path / "quantized"), list[tuple[str, float]]()
    report = quantize_folder(bf16_folder, target, lambda line, fraction: lines.append((line, fraction)))
    assert storage.is_committed(target)
    assert storage.read_json(storage.join(target, "quantization.json")) == report
    before, after = WeightsReader(bf16_folder), WeightsReader(target)
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


def test_no_more_than_one_shard_is_in_memory(bf16_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
    quantize_folder(bf16_folder, str(tmp_path / "quantized"))
    reader = WeightsReader(bf16_folder)
    largest = max(len(reader.names_in(file)) for file in reader.files)
    assert 0 < most <= largest < len(reader.names)


def test_a_quantized_or_identical_folder_is_refused(bf16_folder: str, tmp_path: Path) -> None:
    target = str(tmp_path / "quantized")
    quantize_folder(bf16_folder, target)
    with pytest.raises(WeightsError, match="quantized already"):
        quantize_folder(target, str(tmp_path / "again"))
    with pytest.raises(InvalidInputError, match="name another folder"):
        quantize_folder(bf16_folder, bf16_folder + "/")
    assert storage.is_committed(bf16_folder)


def test_a_truncated_source_leaves_the_target_without_a_marker(bf16_folder: str, tmp_path: Path) -> None:
    shard = sorted(Path(bf16_folder).glob("*.safetensors"))[-1]
    shard.write_bytes(shard.read_bytes()[:-3])
    with pytest.raises(WeightsError, match="truncated"):
        quantize_folder(bf16_folder, str(tmp_path / "quantized"))
    assert not storage.is_committed(str(tmp_path / "quantized"))


def test_as_a_program(bf16_folder: str, tmp_path: Path) -> None:
    def run(source: str, *options: str) -> Any:
        command = [sys.executable, "-m", "model.quantize", "--source", source, "--target", str(tmp_path / "quantized")]
        command += options
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)

    done = run(bf16_folder)
    assert done.returncode == 0, done.stderr
    assert "100% quantized" in done.stdout
    assert storage.is_committed(str(tmp_path / "quantized"))
    failed = run(str(tmp_path / "nowhere"))
    assert failed.returncode == MissingFileError.exit_code
    assert failed.stderr.startswith("error: ")
    assert "nowhere" in failed.stderr
    wrong = run(bf16_folder, "--format", "int3")
    assert wrong.returncode == ConfigError.exit_code
    assert "must be one of bf16, fp8, fp8_block, fp8_channel, int8, nvfp4, w4a16 (got 'int3')" in wrong.stderr
