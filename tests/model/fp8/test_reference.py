"""fp8 quantization in plain torch: each block's scale by hand, the error of a product, and what is left out."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from model.fp8 import reference
from model.fp8.reference import BLOCK

Numbers = Callable[..., Tensor]
Relative = Callable[[Tensor, Tensor], float]


@pytest.mark.parametrize(("rows", "width"), [(256, 384), (40, 200), (1, 144)])
def test_rows_have_a_scale_for_each_128_columns(rows: int, width: int, numbers: Numbers) -> None:
    x_RD = numbers(rows, width, device="cpu")
    x_RD[0] = 0
    values, scale = reference.cast_rows(x_RD)
    assert values.shape == (rows, width)
    assert scale.shape == (-(-width // BLOCK), -(-rows // BLOCK) * BLOCK)
    for row in range(rows):
        for block in range(scale.shape[0]):
            columns = slice(block * BLOCK, (block + 1) * BLOCK)
            largest = x_RD[row, columns].float().abs().max()
            expected = largest / 448 if largest > 0 else torch.tensor(1.0)
            assert scale[block, row] == expected
            assert torch.equal(
                values[row, columns].float(), (x_RD[row, columns].float() / expected).to(reference.E4M3).float()
            )
    error = (reference.dequantize_rows(values, scale) - x_RD.float()).abs()
    # e4m3 has 3 bits after the point: half a step is 1/16 of a value; below 2^-6 scales it is a denormal's 2^-10.
    per_column = scale.t()[:rows].repeat_interleave(BLOCK, 1)[:, :width]
    assert (error <= x_RD.float().abs() / 16 + per_column * 2**-10).all()


def test_the_transpose_is_quantized_along_its_own_rows(numbers: Numbers) -> None:
    x_RD = numbers(200, 300, device="cpu")
    values, scale = reference.cast_transposed(x_RD)
    assert (values.shape, scale.shape) == ((300, 256), (2, 300))
    padded = torch.nn.functional.pad(x_RD, (0, 0, 0, 56))
    plain, plain_scale = reference.cast_rows(padded.t().contiguous())
    assert torch.equal(values.float(), plain.float())
    assert torch.equal(scale, plain_scale[:, :300])
    assert not values[:, 200:].float().any(), "padding is zero"


def test_a_weight_and_its_transpose_share_their_blocks(numbers: Numbers) -> None:
    weight_EXD = numbers(3, 200, 300, device="cpu")
    weight_EXD[1] = 0
    plain, transposed = (reference.cast_weight(weight_EXD, wanted) for wanted in (False, True))
    assert (plain[0].shape, plain[1].shape) == ((3, 200, 300), (3, 2, 3))
    for kept, turned in zip(plain, transposed, strict=True):
        assert torch.equal(kept.float(), turned.float().transpose(1, 2))
    assert plain[1][2, 1, 2] == weight_EXD[2, 128:, 256:].float().abs().max() / 448
    assert torch.equal(plain[1][1], torch.ones(2, 3)), "a block of zeros has a scale that divides nothing by zero"


def test_a_product_and_its_gradients_are_exact_but_for_the_rounding_of_operands(
    numbers: Numbers, relative: Relative
) -> None:
    shapes = [(150, 256), (1, 384, 256), (150, 384)]
    x, weight, grad = (numbers(*shape, seed=n, device="cpu") for n, shape in enumerate(shapes))
    plain, transposed = (reference.cast_weight(weight, wanted) for wanted in (False, True))
    out, *x_transposed = reference.linear_forward(x, *plain)
    assert 0.01 < relative(out, x.float() @ weight[0].float().t()) < 0.06
    grad_x, grad_weight = reference.linear_backward(grad, *transposed, *x_transposed, True)
    assert 0.01 < relative(grad_x, grad.float() @ weight[0].float()) < 0.06
    assert 0.01 < relative(grad_weight, grad.float().t() @ x.float()) < 0.06
    frozen = reference.linear_backward(grad, *transposed, *x_transposed, False)
    assert torch.equal(frozen[0], grad_x)
    assert frozen[1].numel() == 0
