"""Fingerprints by bits: they follow a tensor's values, not its layout, and a single flipped bit shows."""

from __future__ import annotations

import pytest
import torch

from cherry.distributed.bits import bit_sum


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.uint8])
@pytest.mark.parametrize("shape", [(7, 11), (8, 8), (1,), ()])
def test_any_flipped_bit_shows_and_a_layout_does_not(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape).mul(50).abs().to(dtype)
    words = x.numpy(force=True).tobytes() if dtype != torch.bfloat16 else x.view(torch.int16).numpy().tobytes()
    words += bytes(-len(words) % 8)
    expected = sum(int.from_bytes(words[place : place + 8], "little") for place in range(0, len(words), 8))
    assert bit_sum(x).item() == (expected + 2**63) % 2**64 - 2**63
    spread = torch.stack([x, x], dim=-1)[..., 0]
    assert spread.shape == x.shape and torch.equal(bit_sum(spread), bit_sum(x))
    within = torch.cat([x.new_ones(1), x.flatten()])[1:]
    assert torch.equal(bit_sum(within), bit_sum(x)), "it begins between two words"
    last = x.numel() * x.itemsize - x.itemsize
    for bit in range(8 * x.itemsize):
        flipped = x.clone()
        flipped.view(-1).view(torch.uint8)[last + bit // 8] ^= 1 << bit % 8
        assert not torch.equal(bit_sum(flipped), bit_sum(x)), bit


def test_the_bits_of_nan_count() -> None:
    x = torch.tensor([float("nan"), 1.0])
    assert torch.equal(bit_sum(x), bit_sum(x.clone()))
    other = x.clone()
    other.view(torch.int32)[0] ^= 1
    assert other.isnan()[0] and not torch.equal(bit_sum(other), bit_sum(x))
