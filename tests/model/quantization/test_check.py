"""A quantized folder against its source: what is whole passes in every format, each kind of damage is named."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from base import storage
from base.errors import WeightsError
from model.numerics.formats import FORMATS
from model.quantization.check import check_quantized
from model.quantization.folder import quantize_folder
from model.weights.pretrained import write_index
from model.weights.reader import WeightsReader
from model.weights.safetensors_file import write_file

EXPERT = "model.layers.1.mlp.experts.0"


def rewritten(folder: Path, change: dict[str, Tensor | None]) -> str:
    """Replace tensors of a folder (None removes one) in one file."""
    reader = WeightsReader(str(folder))
    tensors = {name: reader.read(name).clone() for name in reader.names} | change
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    for file in folder.glob("*.safetensors"):
        file.unlink()
    write_file(str(folder / "model.safetensors"), kept)
    write_index(str(folder), dict.fromkeys(kept, "model.safetensors"))
    return str(folder)


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_every_format_passes(name: str, plain_folder: str, quantized_folders: dict[str, str]) -> None:
    check_quantized(plain_folder, quantized_folders[name])


def test_each_difference_is_named(plain_folder: str, quantized_folders: dict[str, str], tmp_path: Path) -> None:
    whole = Path(quantized_folders["int8"])
    reader = WeightsReader(str(whole))
    name = f"{EXPERT}.down_proj.weight"
    values = reader.read(name)
    changes: dict[str, dict[str, Tensor | None]] = {
        f"{name}_scale is missing": {f"{name}_scale": None},
        "model.layers.1.extra.weight is not expected": {"model.layers.1.extra.weight": torch.zeros(1)},
        f"{name} must have the shape": {name: values[:-1]},
        f"{name} must be of torch.int8 \\(got torch.uint8\\)": {name: values.view(torch.uint8)},
        "model.norm.weight is missing": {"model.norm.weight": None},
    }
    for number, (words, change) in enumerate(changes.items()):
        damaged = tmp_path / str(number)
        shutil.copytree(whole, damaged)
        with pytest.raises(WeightsError, match=f"{words}.*Quantize the plain weights again"):
            check_quantized(plain_folder, rewritten(damaged, change))


def test_fused_weights_with_two_scales_are_found(
    plain_folder: str, quantized_folders: dict[str, str], tmp_path: Path
) -> None:
    damaged = tmp_path / "nvfp4"
    shutil.copytree(quantized_folders["nvfp4"], damaged)
    shared = f"{EXPERT}.up_proj.weight_global_scale"
    value = WeightsReader(str(damaged)).read(shared)
    with pytest.raises(WeightsError, match=f"{shared} must equal that of {EXPERT}.gate_proj.weight"):
        check_quantized(plain_folder, rewritten(damaged, {shared: value * 1.5}))


def test_a_folder_of_another_model_is_found(bf16_folder: str, tmp_path: Path) -> None:
    target = str(tmp_path / "fp8")
    quantize_folder(bf16_folder, target, format_name="fp8")
    config = storage.read_json(storage.join(target, "config.json"))
    del config["quantization_config"]
    storage.write_json(storage.join(target, "config.json"), config)
    with pytest.raises(WeightsError, match=r"weight_scale_inv is not expected|must be of"):
        check_quantized(bf16_folder, target)
