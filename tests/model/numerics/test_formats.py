"""The registry of quantization formats, by a second format that shares scales over groups and has names of its own."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from base import storage
from base.errors import ConfigError, WeightsError
from cherry.data.prepare import HeldoutDocument
from cherry.heldout import model_score, score_documents
from model.experts import Experts
from model.layers import Fp32Buffers
from model.model_config import ModelConfig
from model.numerics.formats import DEFAULT_FORMAT, FORMATS, FormatEntry, StoredEntry, detect_format, is_projection
from model.quantize import plan_groups, quantize_folder, quantize_groups
from model.transformer import DeepseekV3
from model.weights.pretrained import load_pretrained, save_pretrained, state_to_hf
from model.weights.reader import WeightsReader

ROOT = Path(__file__).parents[3]
VALUES, SCALE = "_packed", "_group_scale"


class GroupFormat:
    """16-bit integers under one scale per group: gate and up of one MLP together, every other projection by itself."""

    entries: Mapping[str, StoredEntry] = {
        "weight_packed": StoredEntry("weight", VALUES),
        "weight_group_scale": StoredEntry("weight", SCALE),
        "w13_packed": StoredEntry("w13_EFD", VALUES),
        "w13_group_scale": StoredEntry("w13_EFD", SCALE),
        "w2_packed": StoredEntry("w2_EDF", VALUES),
        "w2_group_scale": StoredEntry("w2_EDF", SCALE),
    }
    quantization_config: Mapping[str, Any] = {"quant_method": "toy", "format": "group16"}

    def recognizes(self, quantization_config: Mapping[str, Any]) -> bool:
        return quantization_config.get("quant_method") == "toy"

    def group(self, hf_name: str) -> str | None:
        return re.sub(r"\.(gate|up)_proj", ".gate_up", hf_name) if is_projection(hf_name) else None

    def quantize(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        scale = torch.stack([weight.float().abs().max() for weight in weights.values()]).max()[None] / 32767
        stored: dict[str, Tensor] = {}
        for name, weight in weights.items():
            stored[name + VALUES] = (weight.float() / scale).round().to(torch.int16)
            stored[name + SCALE] = scale.clone()
        return stored

    def dequantize(self, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
        names = [name.removesuffix(VALUES) for name in stored if name.endswith(VALUES)]
        return {name: stored[name + VALUES] * stored[name + SCALE] for name in names}

    def replacement(self, name: str, module: nn.Module, dtype: torch.dtype) -> nn.Module:
        if isinstance(module, Experts):
            return GroupExperts(module.w13_EFD, module.w2_EDF)
        assert isinstance(module, nn.Linear)
        return GroupLinear(module.weight, fused=2 if name.endswith("gate_up_proj") else 1)


def wide(values: Tensor, scales: Tensor) -> Tensor:
    """Values times the scale of the half of the rows that they are in."""
    return values * scales.repeat_interleave(values.shape[-2] // scales.shape[-1], -1)[..., None]


class GroupLinear(Fp32Buffers):
    weight_packed: Tensor
    weight_group_scale: Tensor

    def __init__(self, weight: Tensor, *, fused: int) -> None:
        super().__init__()
        self.register_buffer("weight_packed", torch.empty_like(weight, dtype=torch.int16))
        self.register_buffer("weight_group_scale", torch.empty(fused, device=weight.device))

    @property
    def weight(self) -> Tensor:
        return wide(self.weight_packed, self.weight_group_scale)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


class GroupExperts(Fp32Buffers, Experts):
    def __init__(self, w13: Tensor, w2: Tensor) -> None:
        nn.Module.__init__(self)
        for name, weight, fused in (("w13", w13, 2), ("w2", w2, 1)):
            self.register_buffer(f"{name}_packed", torch.empty_like(weight, dtype=torch.int16))
            self.register_buffer(f"{name}_group_scale", torch.empty(weight.shape[0], fused, device=weight.device))

    def run(self, rows_RD: Tensor, weight_R: Tensor, counts_E: Tensor) -> Tensor:
        w13, w2 = (wide(self._buffers[f"{n}_packed"], self._buffers[f"{n}_group_scale"]) for n in ("w13", "w2"))  # type: ignore[arg-type]
        outputs = []
        for x, weight, up, down in zip(
            *(t.split(counts_E.tolist()) for t in (rows_RD, weight_R)), w13, w2, strict=True
        ):
            gate, linear = F.linear(x, up).chunk(2, dim=-1)
            outputs.append(F.linear(F.silu(gate) * linear * weight[:, None], down))
        return torch.cat(outputs)


FORMAT = GroupFormat()


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> str:
    """Name of the second format, registered."""

    class Entry(FormatEntry):
        def load(self) -> GroupFormat:
            return FORMAT

    monkeypatch.setitem(FORMATS, "group16", Entry("tests", "16 bits per group"))
    return "group16"


@pytest.fixture
def folder(tmp_path: Path, make_config: Callable[..., ModelConfig], make_model: Callable[..., DeepseekV3]) -> str:
    model = make_model(make_config())
    named = (pair for name, tensor in model.state_dict().items() for pair in state_to_hf(name, tensor, model.config))
    uri = str(tmp_path / "export")
    # Files so small that gate and up are in different ones.
    save_pretrained(named, uri, model.config, dtype=torch.float32, max_shard_bytes=12_000)
    return uri


def document(number: int, config: ModelConfig) -> HeldoutDocument:
    tokens = torch.randint(config.vocab_size, (20,), generator=torch.Generator().manual_seed(number)).tolist()
    return HeldoutDocument(str(number), tokens, [False] + [True] * 19, bytes=19, text="text")


def test_a_second_format_is_quantized_loaded_and_evaluated(toy: str, folder: str, tmp_path: Path) -> None:
    target = str(tmp_path / "quantized")
    report = quantize_folder(folder, target, format_name=toy)
    before, after = WeightsReader(folder), WeightsReader(target)
    assert report["format"] == "16 bits per group"
    assert {item["name"] for item in report["tensors"]} == {name for name in before.names if is_projection(name)}
    assert storage.read_json(storage.join(target, "config.json"))["quantization_config"] == FORMAT.quantization_config
    base = "model.layers.1.mlp.experts.3."
    gate, up = (f"{base}{half}_proj.weight" for half in ("gate", "up"))
    assert before.file_of(gate) is not before.file_of(up)
    assert after.file_of(gate + VALUES) is after.file_of(up + VALUES)
    assert torch.equal(after.read(gate + SCALE), after.read(up + SCALE))
    largest = torch.stack([before.read(name).abs().max() for name in (gate, up)]).max()
    assert after.read(gate + SCALE).item() == pytest.approx(largest.item() / 32767, rel=1e-6)

    plain, model = (load_pretrained(uri, dtype=torch.float32) for uri in (folder, target))
    kinds = [type(module) for module in model.modules()]
    assert (kinds.count(GroupExperts), kinds.count(GroupLinear)) == (len(plain.moe_layers()), kinds.count(GroupLinear))
    assert kinds.count(GroupLinear) > 10
    documents = [document(number, plain.config) for number in range(4)]
    exact, rounded = (
        [one.nll for one in score_documents(model_score(m, torch.device("cpu")), documents, 32)] for m in (plain, model)
    )
    assert rounded == pytest.approx(exact, rel=2e-3)
    assert rounded != exact


@pytest.mark.parametrize("name", ["group16", DEFAULT_FORMAT])
def test_files_of_a_folder_can_be_quantized_in_any_order(name: str, toy: str, folder: str, tmp_path: Path) -> None:
    target = str(tmp_path / "quantized")
    quantize_folder(folder, target, format_name=name)
    whole = WeightsReader(target)
    quantization = FORMATS[name].load()
    for file, groups in reversed(plan_groups(WeightsReader(folder), quantization).items()):
        tensors, _ = quantize_groups(WeightsReader(folder), quantization, groups)
        assert set(tensors) == (set(whole.names_in(file)) if groups else set())
        assert all(torch.equal(tensor, whole.read(key)) for key, tensor in tensors.items())


def test_a_format_is_found_by_the_folder_and_an_unknown_one_is_refused(toy: str) -> None:
    def of(described: Mapping[str, Any] | None) -> str | None:
        return detect_format({"quantization_config": described}, "here/config.json")

    for name, entry in FORMATS.items():
        assert of(entry.load().quantization_config) == name
    assert of(None) is None
    assert of({"quant_method": "fp8", "weight_block_size": [128, 128]}) is None
    with pytest.raises(WeightsError, match=r"here/config.json.*group16, int8.*got quant_method 'awq'"):
        of({"quant_method": "awq"})


def test_an_unknown_name_is_refused_with_the_names_there_are(toy: str, folder: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"group16, int8 \(got 'int3'\)"):
        quantize_folder(folder, str(tmp_path / "quantized"), format_name="int3")
    assert not (tmp_path / "quantized").exists()


def test_a_format_that_needs_a_gpu_is_not_loaded_without_one(
    toy: str, folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = str(tmp_path / "quantized")
    quantize_folder(folder, target, format_name=toy)
    monkeypatch.setitem(FORMATS, toy, replace(FORMATS[toy], min_compute_capability=(10, 0)))
    with pytest.raises(ConfigError, match=r"group16 need a GPU of compute capability 10.0 .*\(got cpu\)"):
        load_pretrained(target, dtype=torch.float32)


def test_int8_is_named_in_its_own_file_and_the_registry_alone() -> None:
    named = set()
    for package in ("base", "model", "anything", "tasks", "flows"):  # in cherry it is a codec of gradients
        for path in (ROOT / package).rglob("*.py"):
            text = path.read_text(encoding="utf-8").replace("torch.int8", "")
            if re.search(r"(?<![a-z])int8", text, re.IGNORECASE):
                named.add(str(path.relative_to(ROOT)))
    assert named == {"model/numerics/int8_format.py", "model/numerics/formats.py"}
