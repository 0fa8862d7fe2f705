"""Shared small configurations and models of the model's tests."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from model.model_config import PRESETS, ModelConfig
from model.numerics.formats import FORMATS
from model.quantization.folder import quantize_folder
from model.transformer import DeepseekV3
from model.weights.pretrained import save_pretrained, state_to_hf

# Small enough that a forward pass takes milliseconds.
SMALL: dict[str, Any] = {
    **PRESETS["tiny"],
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 64,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "max_position_embeddings": 256,
}


def small_config(**changes: Any) -> ModelConfig:
    return ModelConfig(**{**SMALL, **changes})


def random_model(config: ModelConfig, *, seed: int = 0, bias: float = 0.3) -> DeepseekV3:
    """Weights large enough that a wrong scale or order shows, norms that are not one, biases of both signs."""
    model = DeepseekV3(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.uniform_(0.5, 1.5, generator=generator)
            else:
                std = 1.0 if name == "embed_tokens.weight" else 1.5 / parameter.shape[-1] ** 0.5
                parameter.normal_(std=std, generator=generator)
        for moe in model.moe_layers():
            if moe.e_score_correction_bias_E is not None:
                moe.e_score_correction_bias_E.normal_(mean=-bias, std=bias, generator=generator)
    return model


def random_tokens(config: ModelConfig, batch: int, length: int, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(config.vocab_size, (batch, length), generator=generator)


@pytest.fixture
def make_config() -> Callable[..., ModelConfig]:
    return small_config


@pytest.fixture
def make_model() -> Callable[..., DeepseekV3]:
    return random_model


@pytest.fixture
def make_tokens() -> Callable[..., torch.Tensor]:
    return random_tokens


@pytest.fixture
def bf16_folder(tmp_path: Path) -> str:
    """Folder of a small random model in bf16, in several shards."""
    model = random_model(small_config())
    named = (pair for name, tensor in model.state_dict().items() for pair in state_to_hf(name, tensor, model.config))
    uri = str(tmp_path / "export")
    save_pretrained(named, uri, model.config, dtype=torch.bfloat16, max_shard_bytes=30_000)
    return uri


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
