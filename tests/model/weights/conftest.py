"""Exported folders of small models, in several shards."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from model.model_config import ModelConfig
from model.transformer import DeepseekV3
from model.weights.pretrained import save_pretrained, state_to_hf


def write_export(model: DeepseekV3, uri: str, **options: Any) -> None:
    named = [pair for name, value in model.state_dict().items() for pair in state_to_hf(name, value, model.config)]
    save_pretrained(named, uri, model.config, **{"dtype": torch.float32, "max_shard_bytes": 60_000, **options})


@pytest.fixture
def export() -> Callable[..., None]:
    """Writes a model's weights to a folder; options are those of `save_pretrained`."""
    return write_export


@pytest.fixture
def folder(tmp_path: Path, make_config: Callable[..., ModelConfig], make_model: Callable[..., DeepseekV3]) -> str:
    """Folder of a small random model in fp32."""
    uri = str(tmp_path / "export")
    write_export(make_model(make_config()), uri)
    return uri
