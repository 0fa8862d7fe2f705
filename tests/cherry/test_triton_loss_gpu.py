"""The Triton kernel of the loss against torch in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from cherry.loss import IGNORE_INDEX, cross_entropy_sum

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU and finds none"),
]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 3e-3), (torch.float32, 1e-5)])
@pytest.mark.parametrize("chunk", [64, 300])
def test_loss_and_gradients_equal_float64(dtype: torch.dtype, tolerance: float, chunk: int) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(300, 256, device="cuda", dtype=dtype, requires_grad=True)
    weight = (torch.randn(10_007, 256, device="cuda") / 16).to(dtype).requires_grad_()
    targets = torch.randint(10_007, (300,), device="cuda")
    targets[::7] = IGNORE_INDEX
    expected = F.cross_entropy(hidden.double() @ weight.double().T, targets, ignore_index=IGNORE_INDEX, reduction="sum")
    gradients = torch.autograd.grad(expected, (hidden, weight))
    loss = cross_entropy_sum(hidden, weight, targets, chunk_tokens=chunk)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    for ours, exact in zip(torch.autograd.grad(loss, (hidden, weight)), gradients, strict=True):
        assert (ours.double() - exact).norm() <= tolerance * exact.norm()
