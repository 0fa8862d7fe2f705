"""int8 weights on a GPU: the logits of the CPU."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from model.model_config import ModelConfig
from model.quantize import quantize_folder
from model.transformer import DeepseekV3
from model.weights.pretrained import load_pretrained, save_pretrained, state_to_hf

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU and finds none"),
]


MakeConfig = Callable[..., ModelConfig]
MakeModel = Callable[..., DeepseekV3]
MakeTokens = Callable[..., Tensor]


def export(model: DeepseekV3, folder: Path) -> None:
    named = (pair for name, tensor in model.state_dict().items() for pair in state_to_hf(name, tensor, model.config))
    save_pretrained(named, str(folder), model.config, dtype=torch.float32)


def test_the_int8_model_on_cuda_equals_the_cpu(
    tmp_path: Path, make_config: MakeConfig, make_model: MakeModel, make_tokens: MakeTokens
) -> None:
    config = make_config()
    export(make_model(config), tmp_path / "export")
    quantize_folder(str(tmp_path / "export"), str(tmp_path / "quantized"))
    models = [load_pretrained(str(tmp_path / "quantized"), dtype=torch.float32, device=d) for d in ("cpu", "cuda")]
    tokens = make_tokens(config, 2, 20)
    with torch.no_grad():
        cpu, cuda = (model.logits(model(tokens.to(model.lm_head.weight.device)).hidden_BTD).cpu() for model in models)
    torch.testing.assert_close(cpu, cuda, rtol=1e-4, atol=1e-4)
