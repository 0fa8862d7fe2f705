"""fp8 weights with a scale per channel: values and scales by hand, and scales that are found again."""

import torch

from model.numerics.e4m3 import DTYPE
from model.numerics.fp8_channel import Fp8Channel, quantize


def test_a_trained_channel_s_scale_is_its_largest_magnitude_over_448() -> None:
    weight = torch.randn(300, 200, generator=torch.Generator().manual_seed(0)) * torch.logspace(-4, 3, 300)[:, None]
    weight[9] = 0.0
    values, scale = quantize(weight)
    expected = weight.abs().amax(1, keepdim=True) / 448
    expected[9] = 1.0
    assert torch.equal(scale, expected)
    assert torch.equal(values.view(torch.uint8), (weight / expected).to(DTYPE).view(torch.uint8))


def test_channels_that_had_other_scales_keep_every_value() -> None:
    generator = torch.Generator().manual_seed(1)
    values = (torch.randn(140, 200, generator=generator) * 60).clamp(-448, 448).to(DTYPE)
    scale = 2.0 ** torch.randint(-20, -5, (140, 1), generator=generator)
    exact = torch.empty(140, 200)
    Fp8Channel().dequantize({"": values, "_scale": scale}, exact)
    assert torch.equal(exact, values.float() * scale)
    again = torch.empty(140, 200)
    (stored,) = Fp8Channel().quantize([exact])
    Fp8Channel().dequantize(stored, again)
    assert torch.equal(again, exact)
