"""The Triton kernels of AdamW against torch's AdamW and norm."""

from __future__ import annotations

import math

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU and finds none"),
]


def test_one_pass_clips_steps_and_copies_as_torch_does() -> None:
    from cherry.optim.triton_adamw import adamw_, square_sum

    torch.manual_seed(0)
    param = torch.randn(70_001, device="cuda")
    reference = param.clone().requires_grad_()
    optimizer = torch.optim.AdamW([reference], lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
    mean, square, copy = torch.zeros_like(param), torch.zeros_like(param), torch.empty_like(param, dtype=torch.bfloat16)

    def step(gradient: torch.Tensor, clip: float, number: int) -> None:
        coefficient = torch.tensor(clip, device="cuda")
        count = torch.tensor(float(number), device="cuda")
        constants = {"rate": 1e-3, "decay": 0.1, "betas": (0.9, 0.95), "epsilon": 1e-8}
        adamw_(param, gradient, mean, square, copy, coefficient, count, **constants)

    for number in range(1, 5):
        gradient = torch.randn_like(param)
        reference.grad = gradient * 0.5
        optimizer.step()
        step(gradient, 0.5, number)
    torch.testing.assert_close(param, reference.detach(), rtol=1e-6, atol=1e-6)
    assert torch.equal(copy, param.bfloat16())
    assert square_sum([gradient, gradient]).item() == pytest.approx(
        2 * gradient.double().square().sum().item(), rel=1e-5
    )
    before = param.clone()
    step(gradient, math.nan, 5)
    assert torch.equal(param, before), "a gradient that is no number changes nothing"
