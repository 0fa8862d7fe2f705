"""The registry of quantization formats: names, recognition by config.json, devices; without torch."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationConfig

from base import storage
from base.errors import ConfigError, WeightsError
from model.model_config import PRESETS, ModelConfig
from model.numerics.formats import (
    DEFAULT_FORMAT,
    FORMATS,
    detect_format,
    find_format,
    is_projection,
    quantized_config,
)
from model.numerics.fp8_blocks import quantization_config
from model.quantize import quantize_folder
from model.weights.pretrained import WeightsReader, load_pretrained

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize("preset", sorted(PRESETS))
@pytest.mark.parametrize("name", FORMATS)
def test_a_format_is_found_by_its_config_json_and_by_no_other(name: str, preset: str) -> None:
    config = ModelConfig(preset=preset)
    written = quantized_config({"torch_dtype": "bfloat16", "x": 1}, FORMATS[name].load(config))
    written = json.loads(json.dumps(written))
    assert written["x"] == 1
    assert [other for other, entry in FORMATS.items() if entry.recognizes(written)] == [name]
    assert detect_format(written, "here/config.json") == name
    if written.get("quantization_config", {}).get("quant_method") == "compressed-tensors":
        QuantizationConfig.model_validate(written["quantization_config"])  # refuses unknown keys and values


def test_plain_weights_of_another_type_have_no_format() -> None:
    assert detect_format({"torch_dtype": "float32"}, "config.json") is None
    assert detect_format({"quantization_config": None, "dtype": "bfloat16"}, "config.json") == "bf16"


def int4(**changes: Any) -> dict[str, Any]:
    weights = {"num_bits": 4, "type": "int", "strategy": "group", "symmetric": True, **changes}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    return {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups}


@pytest.mark.parametrize(
    "described",
    [
        {"quant_method": "awq", "format": "gemm"},
        {"quant_method": "compressed-tensors", "format": "pack-quantized"},
        {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"group_0": None}},
        int4(),  # every layer in int4, not the experts alone
        int4(symmetric=False),
    ],
)
def test_what_no_format_writes_is_refused(described: Mapping[str, Any]) -> None:
    rule = rf"here/config.json: quantization_config .*fp8, .*int8, .*got quant_method '{described['quant_method']}'"
    with pytest.raises(WeightsError, match=rule):
        detect_format({"quantization_config": described}, "here/config.json")


def test_the_config_json_of_a_quantized_folder_replaces_what_its_source_said(
    make_config: Callable[..., ModelConfig],
) -> None:
    source = {"a": 1, "torch_dtype": "float32", "quantization_config": quantization_config()}
    bf16, int8 = (FORMATS[name].load(make_config()) for name in ("bf16", "int8"))
    assert quantized_config(source, bf16) == {"a": 1, "torch_dtype": "bfloat16"}
    assert quantized_config(source, int8) == {
        "a": 1, "torch_dtype": "float32", "quantization_config": int8.quantization_config,
    }  # fmt: skip


def test_an_unknown_name_is_refused_with_the_names_there_are(plain_folder: str, tmp_path: Path) -> None:
    assert find_format(DEFAULT_FORMAT) is FORMATS[DEFAULT_FORMAT]
    with pytest.raises(ConfigError, match=r"bf16, fp8, fp8_block, fp8_channel, int8, nvfp4, w4a16 \(got 'int3'\)"):
        quantize_folder(plain_folder, str(tmp_path / "quantized"), format_name="int3")
    assert not (tmp_path / "quantized").exists()


def test_a_format_that_needs_a_gpu_is_not_loaded_without_one(
    quantized_folders: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(FORMATS, "nvfp4", replace(FORMATS["nvfp4"], min_compute_capability=(10, 0)))
    with pytest.raises(ConfigError, match=r"nvfp4 need a GPU of compute capability 10.0 .*\(got cpu\)"):
        load_pretrained(quantized_folders["nvfp4"], dtype=torch.float32)


@pytest.mark.parametrize("name", FORMATS)
def test_what_is_kept_keeps_its_value_and_what_shrinks_shrinks(
    name: str, plain_folder: str, quantized_folders: dict[str, str]
) -> None:
    before, after = WeightsReader(plain_folder), WeightsReader(quantized_folders[name])
    config = storage.read_json(storage.join(quantized_folders[name], "config.json"))
    assert detect_format(config, "config.json") == name
    kept = [weight for weight in before.names if not is_projection(weight)]
    assert any("eh_proj" in weight for weight in kept)
    for weight in kept:
        assert torch.equal(before.read(weight).to(after.dtype(weight)), after.read(weight)), weight
        assert after.dtype(weight) == (before.dtype(weight) if name != "bf16" or "bias" in weight else torch.bfloat16)
    report = storage.read_json(storage.join(quantized_folders[name], "quantization.json"))
    assert report["format"] == FORMATS[name].description
    quantized = {item["name"] for item in report["tensors"]}
    assert {weight for weight in quantized if is_projection(weight)} == {w for w in before.names if is_projection(w)}
    experts = [weight for weight in quantized if ".experts." in weight]
    held = sum(after.info(key).stop - after.info(key).start for key in after.names if ".mlp.experts." in key)
    bits = held * 8 / sum(torch.Size(before.shape(weight)).numel() for weight in experts)
    most = {"bf16": 16.0, "w4a16": 4.6, "nvfp4": 4.6}.get(name, 8.6)
    assert most - 0.6 <= bits <= most


def test_int8_is_named_in_its_own_files_and_the_registry_alone() -> None:
    named = set()
    for package in ("base", "model", "anything", "tasks", "flows"):  # in cherry it is a codec of gradients
        for path in (ROOT / package).rglob("*.py"):
            text = path.read_text(encoding="utf-8").replace("torch.int8", "")
            if re.search(r"(?<![a-z])int8", text, re.IGNORECASE):
                named.add(path.relative_to(ROOT).as_posix())
    allowed = {f"model/numerics/{name}.py" for name in ("formats", "mixes", "int8_channel", "int4_groups")}
    # There, as in int4_groups, it is the type that holds four bits.
    assert named == allowed | {"model/calibration/gptq.py", "model/calibration/int4_weight.py"}
