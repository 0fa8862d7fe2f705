"""Quantized models on a GPU: the logits of the CPU, in every format."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from model.numerics.formats import FORMATS
from model.numerics.modules import round_inputs_of
from model.weights.pretrained import load_pretrained

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU and finds none"),
]


@pytest.mark.parametrize("name", FORMATS)
def test_the_quantized_model_on_cuda_equals_the_cpu(
    name: str, quantized_folders: dict[str, str], make_tokens: Callable[..., Tensor]
) -> None:
    models = [load_pretrained(quantized_folders[name], dtype=torch.float32, device=d) for d in ("cpu", "cuda")]
    tokens = make_tokens(models[0].config, 2, 20)
    with torch.no_grad():
        cpu, cuda = (model.logits(model(tokens.to(model.lm_head.weight.device)).hidden_BTD).cpu() for model in models)
    torch.testing.assert_close(cpu, cuda, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", FORMATS)
def test_inputs_are_rounded_on_cuda_as_on_the_cpu(
    name: str, quantized_folders: dict[str, str], make_tokens: Callable[..., Tensor]
) -> None:
    """A sum in another order takes an input over a rounding boundary now and then, so not to the last bit."""
    models = [load_pretrained(quantized_folders[name], dtype=torch.float32, device=d) for d in ("cpu", "cuda")]
    tokens = make_tokens(models[0].config, 2, 20)
    with torch.no_grad():
        plain = models[0].logits(models[0](tokens).hidden_BTD)
        for model in models:
            round_inputs_of(model)
        cpu, cuda = (model.logits(model(tokens.to(model.lm_head.weight.device)).hidden_BTD).cpu() for model in models)
    assert (cpu - cuda).norm() <= 0.1 * (cpu - plain).norm() + 1e-4 * plain.norm()
