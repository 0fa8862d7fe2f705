"""Strips of rows: every row once, small parts on a CPU, magnitudes without a copy; 4-bit codes in bytes."""

import math

import pytest
import torch

from model.numerics.strips import as_rows, largest_magnitude, pack_nibbles, scratch, strips, unpack_nibbles


@pytest.mark.parametrize("shape", [(1, 1), (5, 7168), (300, 100), (3, 1 << 20), (0, 8), (4, 0)])
def test_every_row_is_in_one_strip_that_fits_the_scratch(shape: tuple[int, int]) -> None:
    values_RC = torch.empty(shape)
    rows = [row for part in strips(values_RC) for row in range(part.start, part.stop)]
    assert rows == list(range(shape[0]))
    work = scratch(values_RC)
    assert work.dtype == torch.float32
    assert all(part.stop - part.start <= work.shape[0] for part in strips(values_RC))
    assert work.numel() <= max(1 << 18, shape[1])


@pytest.mark.parametrize("shape", [(1, 8), (128, 4096), (129, 4096), (300, 7168), (1000, 100)])
def test_no_strip_has_rows_of_two_blocks(shape: tuple[int, int]) -> None:
    values_RC = torch.empty(shape)
    parts = list(strips(values_RC, 128))
    assert [row for part in parts for row in range(part.start, part.stop)] == list(range(shape[0]))
    assert all(part.start // 128 == (part.stop - 1) // 128 for part in parts)
    assert max(part.stop - part.start for part in parts) <= len(scratch(values_RC))
    assert len(parts) <= -(-shape[0] // 128) * (1 + shape[1] // 2048)


@pytest.mark.parametrize("dim", [0, 1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_largest_magnitude_is_that_of_abs(dim: int, dtype: torch.dtype) -> None:
    values = torch.randn(5, 6, 7, generator=torch.Generator().manual_seed(0)).to(dtype)
    values[0, 0, 0], values[4, 5, 6] = -math.inf, math.nan
    found = largest_magnitude(values.transpose(0, 2), dim)
    assert found.dtype == dtype
    expected = values.transpose(0, 2).abs().amax(dim, keepdim=True)
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


def test_a_tensor_of_any_dimensions_is_seen_as_rows() -> None:
    assert as_rows(torch.empty(3)).shape == (1, 3)
    assert as_rows(torch.empty(2, 3, 4)).shape == (2, 12)


def test_two_codes_make_a_byte_the_first_in_its_lower_bits() -> None:
    codes_RC = torch.cartesian_prod(torch.arange(16), torch.arange(16)).to(torch.uint8).view(8, 64)
    packed_RB = pack_nibbles(codes_RC)
    assert torch.equal(packed_RB, codes_RC[:, ::2] + 16 * codes_RC[:, 1::2])
    assert torch.equal(unpack_nibbles(packed_RB), codes_RC)
