"""Strips of rows: every row once, small parts on a CPU, magnitudes without a copy; 4-bit codes in bytes."""

import pytest
import torch

from model.numerics.strips import largest_magnitude, pack_nibbles, scratch, strips, unpack_nibbles


@pytest.mark.parametrize("shape", [(1, 1), (5, 7168), (300, 100), (3, 1 << 20), (0, 8), (4, 0)])
def test_every_row_is_in_one_strip_that_fits_the_scratch(shape: tuple[int, int]) -> None:
    values_RC = torch.empty(shape)
    rows = [row for part in strips(values_RC) for row in range(part.start, part.stop)]
    assert rows == list(range(shape[0]))
    work = scratch(values_RC)
    assert work.dtype == torch.float32
    assert all(part.stop - part.start <= work.shape[0] for part in strips(values_RC))
    assert work.numel() <= max(1 << 18, shape[1])


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_the_largest_magnitude_is_that_of_abs(dim: int) -> None:
    values = torch.randn(5, 6, 7, generator=torch.Generator().manual_seed(0))
    assert torch.equal(largest_magnitude(values, dim), values.abs().amax(dim, keepdim=True))


def test_two_codes_make_a_byte_the_first_in_its_lower_bits() -> None:
    codes_RC = torch.cartesian_prod(torch.arange(16), torch.arange(16)).to(torch.uint8).view(8, 64)
    packed_RB = pack_nibbles(codes_RC)
    assert torch.equal(packed_RB, codes_RC[:, ::2] + 16 * codes_RC[:, 1::2])
    assert torch.equal(unpack_nibbles(packed_RB), codes_RC)
