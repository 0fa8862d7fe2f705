"""Folders of a small model in every format."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from model.model_config import ModelConfig
from model.numerics.formats import FORMATS
from model.quantize import quantize_folder
from model.weights.pretrained import save_pretrained, state_to_hf
from tests.model.conftest import random_model, small_config


def fitting_config(**changes: object) -> ModelConfig:
    """Sizes that every format takes: experts in groups of 32; gate and up in partial blocks, which channels replace."""
    return small_config(**{"hidden_size": 64, "moe_intermediate_size": 96, "intermediate_size": 256, **changes})


@pytest.fixture(scope="session")
def plain_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder in fp32, in files so small that gate and up of some experts are in different ones."""
    model = random_model(fitting_config())
    named = (pair for name, tensor in model.state_dict().items() for pair in state_to_hf(name, tensor, model.config))
    uri = str(tmp_path_factory.mktemp("formats") / "plain")
    save_pretrained(named, uri, model.config, dtype=torch.float32, max_shard_bytes=80_000)
    return uri


@pytest.fixture(scope="session")
def quantized_folders(plain_folder: str) -> dict[str, str]:
    """The same folder in each registered format, by the format's name."""
    folders = {name: str(Path(plain_folder).parent / name) for name in FORMATS}
    for name, uri in folders.items():
        quantize_folder(plain_folder, uri, format_name=name)
    return folders
