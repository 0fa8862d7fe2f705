"""int8 weights with a scale per channel: values and scales by hand."""

import torch

from model.numerics.int8_channel import Int8Channel, quantize


def test_every_channel_uses_all_numbers_and_a_channel_of_zeros_stays_so() -> None:
    weight = torch.randn(64, 300, generator=torch.Generator().manual_seed(0)) * torch.logspace(-4, 3, 64)[:, None]
    weight[7] = 0.0
    values, scale = quantize(weight)
    assert values.dtype == torch.int8
    used = torch.arange(64) != 7
    assert (values.abs().amax(1)[used] == 127).all()
    assert torch.equal(scale[used], weight[used].abs().amax(1, keepdim=True) / 127)
    assert torch.equal(values, (weight / scale).round().to(torch.int8))
    assert torch.equal(values[7], torch.zeros(300, dtype=torch.int8))
    assert scale[7].item() == 1.0


def test_it_is_dequantized_in_fp32_and_rounded_once() -> None:
    values, scale = torch.tensor([[127, -3]], dtype=torch.int8), torch.tensor([[0.0123]])
    out = torch.empty(1, 2, dtype=torch.bfloat16)
    Int8Channel().dequantize({"": values, "_scale": scale}, out)
    assert torch.equal(out, (values.float() * scale).bfloat16())
