"""Operators of fp8 layers on Hopper GPUs against model/fp8/reference.py: products within bf16's rounding."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from model.experts import permutation_by_expert
from model.fp8 import ops, reference
from model.fp8.linear import pad_rows

Chosen = Callable[..., Tensor]
Numbers = Callable[..., Tensor]
Relative = Callable[[Tensor, Tensor], float]
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9,
        reason="needs a Hopper GPU and finds none",
    ),
]


@pytest.mark.parametrize(
    ("rows", "width", "columns"),
    [(512, 256, 384), (300, 576, 192), (40, 128, 576), (1, 144, 128), (200, 1408, 256)],
)
def test_linear_passes_equal_the_reference(
    rows: int, width: int, columns: int, numbers: Numbers, relative: Relative
) -> None:
    x, weight, grad = numbers(rows, width), numbers(1, columns, width, seed=1), numbers(rows, columns, seed=2)
    plain, transposed = (ops.cast_weight(weight, wanted) for wanted in (False, True))
    out, *x_transposed = ops.linear_forward(x, *plain)
    assert relative(out, reference.linear_forward(x, *plain)[0]) < 5e-3
    backward = grad, *transposed, *x_transposed, True
    wanted = reference.linear_backward(*backward)
    for got, expected in zip(ops.linear_backward(*backward), wanted, strict=True):
        assert got.shape == expected.shape and relative(got, expected) < 5e-3


def test_expert_passes_equal_the_reference(
    counts: list[int], chosen: Chosen, numbers: Numbers, relative: Relative
) -> None:
    experts_NK = chosen(counts, 4, "cuda")
    rows = pad_rows(permutation_by_expert(experts_NK, torch.tensor(counts, device="cuda")))
    live = rows.token_P >= 0
    x, grad = numbers(len(experts_NK), 256), numbers(len(experts_NK), 256, seed=3)
    weights = numbers(8, 256, 256, seed=1) / 16, numbers(8, 256, 128, seed=2) / 12
    plain, transposed = ([part for w in weights for part in ops.cast_weight(w, wanted)] for wanted in (False, True))
    weight = torch.rand(len(live), device="cuda").where(live, 0)
    forward = x, weight, *rows[:3], *plain
    out, *x_transposed, h = ops.experts_forward(*forward)
    expected = reference.experts_forward(*forward)
    assert relative(out, expected[0]) < 2e-2 and relative(h[live], expected[3][live]) < 5e-3
    backward = grad, weight, *rows, *transposed, *x_transposed, h, True
    wanted = reference.experts_backward(*backward)
    for place, (got, other) in enumerate(zip(ops.experts_backward(*backward), wanted, strict=True)):
        kept = live if place == 1 else slice(None)
        assert relative(got[kept], other[kept]) < 2e-2
