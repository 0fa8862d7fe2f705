"""Calibration on a GPU, beside the same on the CPU."""

import pytest
import torch

from model.calibration.int4_weight import Int4Weight
from model.calibration.method import named
from model.calibration.names import CALIBRATED
from model.calibration.runner import calibrated
from model.weights.pretrained import save_pretrained, state_to_hf
from tests.model.conftest import random_model, random_tokens, small_config

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]
CONFIG = small_config(num_hidden_layers=2, n_routed_experts=4, hidden_size=64, moe_intermediate_size=96)


@pytest.mark.parametrize("name", CALIBRATED)
def test_a_gpu_finds_the_same_values_but_for_a_few_at_the_edge(name, tmp_path):
    model, source = random_model(CONFIG), str(tmp_path / "export")
    named_tensors = (pair for key, tensor in model.state_dict().items() for pair in state_to_hf(key, tensor, CONFIG))
    save_pretrained(named_tensors, source, CONFIG, dtype=torch.bfloat16)
    documents = list(random_tokens(CONFIG, 24, 48))
    on_cpu, on_gpu = (
        dict(
            calibrated(
                source,
                documents,
                tmp_path / device,
                named(name, 32),
                wanted=lambda weight: ".experts." in weight,
                device=device,
            )
        )
        for device in ("cpu", "cuda")
    )
    assert on_gpu.keys() == on_cpu.keys()
    for key, result in on_cpu.items():
        found = on_gpu[key]
        if isinstance(result, Int4Weight):
            assert (found.values_OI == result.values_OI).float().mean() > 0.98, key
        else:
            torch.testing.assert_close(found, result, rtol=1e-3, atol=1e-3)
