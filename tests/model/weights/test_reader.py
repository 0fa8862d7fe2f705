"""Weights reader: the index of a folder, and damaged or missing files named with their tensor."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from base import storage
from base.errors import MissingFileError, WeightsError
from model.model_config import ModelConfig
from model.transformer import DeepseekV3
from model.weights.pretrained import (
    load_pretrained,
    state_to_hf,
)
from model.weights.safetensors_file import SafetensorsFile

Export = Callable[..., None]
MakeConfig = Callable[..., ModelConfig]
MakeModel = Callable[..., DeepseekV3]


def named(model: DeepseekV3) -> list[tuple[str, Tensor]]:
    return [pair for name, value in model.state_dict().items() for pair in state_to_hf(name, value, model.config)]


def test_index_is_what_the_files_hold(folder: str) -> None:
    index = storage.read_json(storage.join(folder, "model.safetensors.index.json"))
    held = {
        name: (file, info)
        for file in set(index["weight_map"].values())
        for name, info in SafetensorsFile(storage.join(folder, file)).tensors.items()
    }
    assert {name: file for name, (file, _) in held.items()} == index["weight_map"]
    assert index["metadata"]["total_size"] == sum(info.stop - info.start for _, info in held.values())


def damaged(folder: str, damage: Callable[[Path], object]) -> str:
    """The text of the error that loading `folder` raises after `damage` to its second shard."""
    shard = sorted(Path(folder).glob("model-00002-*.safetensors"))[0]
    damage(shard)
    with pytest.raises(WeightsError) as caught:
        load_pretrained(folder, dtype=torch.float32)
    assert shard.name in str(caught.value)
    return str(caught.value)


def test_a_truncated_file_is_named_with_the_tensor(folder: str) -> None:
    shard = sorted(Path(folder).glob("model-00002-*.safetensors"))[0]
    last = max(SafetensorsFile(str(shard)).tensors.items(), key=lambda item: item[1].stop)[0]
    text = damaged(folder, lambda path: path.write_bytes(path.read_bytes()[:-1]))
    assert "truncated" in text
    assert last in text


@pytest.mark.parametrize(
    "content", [b"", b"abc", b"\x00" * 100, (50).to_bytes(8, "little") + b"{}", (4).to_bytes(8, "little") + b"nope"]
)
def test_a_malformed_file_is_named(folder: str, content: bytes) -> None:
    text = damaged(folder, lambda path: path.write_bytes(content))
    assert "safetensors" in text


def test_a_truncated_remote_file_is_named(
    tmp_path: Path,
    make_config: MakeConfig,
    make_model: MakeModel,
    export: Export,
) -> None:
    uri = f"memory://{tmp_path.name}"
    export(make_model(make_config()), uri)
    shard = storage.join(uri, next(name for name in storage.list_names(uri) if name.startswith("model-00002")))
    storage.write_bytes(shard, storage.read_bytes(shard)[:-1])
    with pytest.raises(WeightsError, match=r"model-00002.* truncated: tensor model\."):
        load_pretrained(uri, dtype=torch.float32)


def test_a_file_that_is_gone_is_named(folder: str) -> None:
    assert "does not exist" in damaged(folder, lambda path: path.unlink())


def test_a_folder_without_weights_says_so(folder: str, tmp_path: Path) -> None:
    shutil.copy(Path(folder) / "config.json", tmp_path / "config.json")
    with pytest.raises(MissingFileError, match="holds no weights"):
        load_pretrained(str(tmp_path), dtype=torch.float32)
