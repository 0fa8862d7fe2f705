"""Calibration on a GPU: rounding to the nearest gives the CPU's numbers, calibrated weights keep outputs as well."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from model.calibration.int4_weight import Int4Weight
from model.calibration.method import Method
from model.calibration.results import Result
from model.transformer import DeepseekV3
from model.weights.hf_names import pieces
from model.weights.pretrained import load_pretrained, save_pretrained, state_to_hf
from tests.model.calibration.inputs import calibrated
from tests.model.conftest import random_model, random_tokens, small_config

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU and finds none"),
]
CONFIG = small_config(num_hidden_layers=2, n_routed_experts=4, hidden_size=32)
METHODS = {
    "nearest": Method(group=16, gptq=False, search=False),
    "gptq": Method(group=16),
    "awq": Method(group=16, gptq=False, search=True, awq=True),
}


@pytest.fixture
def folder(tmp_path: Path) -> str:
    model = random_model(CONFIG)
    named = (pair for name, tensor in model.state_dict().items() for pair in state_to_hf(name, tensor, CONFIG))
    save_pretrained(named, str(tmp_path / "export"), CONFIG, dtype=torch.bfloat16)
    return str(tmp_path / "export")


def rounded(folder: str, results: dict[str, Result]) -> DeepseekV3:
    model = load_pretrained(folder, dtype=torch.float32)
    for name, entry in model.state_dict().items():
        for hf_name, part in pieces(name, entry.shape, model.config):
            if (result := results.get(hf_name)) is not None:
                entry[part] = result.dequantized() if isinstance(result, Int4Weight) else result
    return model


@torch.no_grad()
def logits(model: DeepseekV3, tokens: Tensor) -> Tensor:
    return model.logits(model(tokens).hidden_BTD)


@pytest.mark.parametrize("name", METHODS)
def test_on_cuda_weights_are_as_good_as_on_the_cpu(name: str, folder: str, tmp_path: Path) -> None:
    tokens = random_tokens(CONFIG, 12, 32)
    expected = logits(load_pretrained(folder, dtype=torch.float32), tokens)
    errors, results = [], []
    for device in ("cpu", "cuda"):
        work = tmp_path / device
        results.append(dict(calibrated(folder, list(tokens), work, METHODS[name], device=device)))
        errors.append(float((logits(rounded(folder, results[-1]), tokens) - expected).norm() / expected.norm()))
    assert results[0].keys() == results[1].keys()
    assert all(not isinstance(one, Tensor) or one.device.type == "cpu" for one in results[1].values())
    assert 0.9 < errors[1] / errors[0] < 1.1, errors
    if name == "nearest":
        for own, other in zip(results[0].values(), results[1].values(), strict=True):
            assert isinstance(own, Int4Weight) and isinstance(other, Int4Weight)
            assert torch.equal(own.values_OI, other.values_OI)
