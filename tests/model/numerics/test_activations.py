"""Rounded activations: the integer and e4m3 products that engines compute, and what is left alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model.fp8 import reference
from model.numerics.activations import e4m3_in_groups
from model.numerics.fp8_blocks import Fp8Blocks
from model.numerics.fp8_channel import Fp8Channel
from model.numerics.int4_groups import Int4Groups
from model.numerics.int8_channel import Int8Channel
from model.numerics.modules import QuantizedLinear, buffer_name, round_inputs_of
from model.numerics.nvfp4 import Nvfp4
from model.numerics.schemes import Scheme


@pytest.fixture
def x_NI() -> Tensor:
    """Inputs of tokens of very different sizes, one of them zero."""
    generator = torch.Generator().manual_seed(0)
    x_NI = torch.randn(2, 5, 320, generator=generator) * torch.logspace(-3, 3, 5)[:, None]
    x_NI[0, 0] = 0.0
    return x_NI


def layer(scheme: Scheme, weight_OI: Tensor) -> QuantizedLinear:
    made = QuantizedLinear(scheme, weight_OI.shape[1], weight_OI.shape[0], torch.float32)
    for suffix, stored in scheme.quantize([weight_OI])[0].items():
        made.get_buffer(buffer_name("weight", suffix)).copy_(stored)
    return made


def test_int8_products_are_integers_times_both_scales(x_NI: Tensor) -> None:
    scheme = Int8Channel()
    weight_OI = torch.randn(24, 320, generator=torch.Generator().manual_seed(1))
    made = layer(scheme, weight_OI)
    round_inputs_of(made)
    values_OI, scale_O1 = scheme.quantize([weight_OI])[0].values()
    scale_N1 = (x_NI.abs().amax(-1, keepdim=True) / 127).clamp_min(1e-30)
    codes_NI = (x_NI / scale_N1).round()
    assert codes_NI.abs().amax() == 127
    sums_NO = codes_NI.double() @ values_OI.double().T
    expected = sums_NO * scale_N1 * scale_O1[:, 0]
    torch.testing.assert_close(made(x_NI).double(), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().amax()))


def test_e4m3_in_groups_is_the_rounding_that_training_uses(x_NI: Tensor) -> None:
    rows = x_NI.flatten(0, 1)
    expected = reference.dequantize_rows(*reference.cast_rows(rows))
    assert torch.equal(e4m3_in_groups(x_NI, reference.BLOCK).flatten(0, 1), expected)


@pytest.mark.parametrize(
    ("function", "bound"),
    [
        (Int8Channel().round_inputs, 0.5 / 127),
        (Fp8Channel().round_inputs, 2.0**-4),
        (Fp8Blocks().round_inputs, 2.0**-4),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_token_has_its_own_scale(
    function: Callable[[Tensor], Tensor], bound: float, dtype: torch.dtype, x_NI: Tensor
) -> None:
    x_NI = x_NI.to(dtype)
    rounded = function(x_NI)
    assert rounded.dtype == dtype
    largest = x_NI.float().abs().amax(-1, keepdim=True)
    slack = 2.0**-8 if dtype == torch.bfloat16 else 1e-6
    assert ((rounded.float() - x_NI.float()).abs() <= (bound + slack) * largest).all()
    assert not torch.equal(rounded, x_NI)
    assert not rounded[0, 0].any()
    # Alone, a token is rounded as among others.
    assert torch.equal(function(x_NI[1, 3:4]), rounded[1, 3:4])


@pytest.mark.parametrize("scheme", [Int4Groups(32), Nvfp4()])
def test_weights_alone_leave_inputs_as_they_are(scheme: Scheme, x_NI: Tensor) -> None:
    assert scheme.round_inputs(x_NI) is x_NI
    assert scheme.config["input_activations"] is None


@pytest.mark.parametrize("scheme", [Int8Channel(), Fp8Channel(), Fp8Blocks()])
def test_inputs_are_rounded_only_when_asked(scheme: Scheme, x_NI: Tensor) -> None:
    made = layer(scheme, torch.randn(16, 320, generator=torch.Generator().manual_seed(2)))
    plain = made(x_NI)
    assert torch.equal(plain, F.linear(x_NI, made.weight))
    round_inputs_of(made)
    assert torch.equal(made(x_NI), F.linear(scheme.round_inputs(x_NI), made.weight))
    assert not torch.equal(made(x_NI), plain)
