"""Quantization kernels of activations and weights against the same casts in plain torch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from model.fp8 import ops, reference
from model.fp8.reference import dequantize_rows

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


def close(got: Tensor, wanted: Tensor) -> bool:
    """Equal, but for numbers between two of e4m3's that a scale's last bit sends the other way."""
    off = (got - wanted).abs() > 1e-6 * wanted.abs()  # a scale's last bit is no difference
    spacing = wanted.abs() / 7 + wanted.abs().max() * 2**-17  # of normal numbers, and of denormal ones
    return bool(off.float().mean() < 0.01 and ((got - wanted).abs() <= spacing)[off].all())


@pytest.mark.parametrize(("rows", "width"), [(256, 384), (40, 576), (300, 128), (1, 144)])
def test_casts_equal_the_reference(rows: int, width: int, numbers: Numbers) -> None:
    from model.fp8 import cast_kernels

    x, weight = numbers(rows, width), numbers(3, rows, width)
    x[:, 5], weight[1] = 0, 0
    plain, transposed = cast_kernels.cast(x)
    assert close(dequantize_rows(*plain), dequantize_rows(*reference.cast_rows(x)))
    assert close(dequantize_rows(*transposed), dequantize_rows(*reference.cast_transposed(x)))
    for wanted in (False, True):
        made = ops.cast_weight(weight, wanted)
        for got, expected in zip(made, reference.cast_weight(weight, wanted), strict=True):
            assert got.shape == expected.shape and close(got.float(), expected.float())
