"""Gradient norm over all parameters, and the coefficient that clips to a maximum norm."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from cherry.optim.grad_norm import clip_coefficient, gradient_norm


@pytest.mark.parametrize(("max_norm", "left"), [(1.0, 1.0), (100.0, 13.0)])
def test_the_norm_is_of_all_gradients_and_the_coefficient_brings_it_to_its_maximum(
    max_norm: float, left: float
) -> None:
    model = nn.Linear(2, 1)
    model.weight.grad, model.bias.grad = torch.tensor([[3.0, 4.0]]), torch.tensor([12.0])
    norm = gradient_norm(model)
    assert float(norm) == pytest.approx(13.0)
    assert float(norm * clip_coefficient(norm, max_norm)) == pytest.approx(left, rel=1e-5)
    assert model.bias.grad.tolist() == [12.0], "the optimizer scales, on its own pass"


def test_a_gradient_that_is_not_finite_shows_in_the_norm() -> None:
    model = nn.Linear(2, 1, bias=False)
    model.weight.grad = torch.tensor([[float("nan"), 1.0]])
    assert not gradient_norm(model).isfinite()
