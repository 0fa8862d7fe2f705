"""e4m3: decoding of all its numbers, and scales that reproduce a block."""

import pytest
import torch

from model.numerics.e4m3 import DTYPE, MAX, PROBE, decode, exact_scales

ALL = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(DTYPE)


def test_every_number_decodes_to_torch_s() -> None:
    numbers = ALL[ALL.float().isfinite()]
    assert len(numbers) == 254
    decoded = decode(numbers, torch.empty(254))
    assert torch.equal(decoded, numbers.float())
    assert torch.equal(decoded.signbit(), numbers.float().signbit()), "of zero too"


def test_a_scale_multiplies_with_one_rounding_whatever_its_size() -> None:
    numbers = ALL[ALL.float().isfinite()]
    fractions = torch.rand(60, 1, generator=torch.Generator().manual_seed(0)) + 1.0
    scales = fractions * 2.0 ** torch.linspace(-149, 127, 60).round()[:, None]
    for scale in (scales, scales[:50], scales[30:31]):
        expected = numbers.float() * scale
        found = decode(numbers.expand(len(scale), -1), torch.empty(len(scale), 254), scale)
        assert torch.equal(found.view(torch.int32), expected.view(torch.int32))
    assert not expected.isnan().any()
    assert (numbers.float() * scales).isinf().any()


@pytest.mark.parametrize("byte", [0x7F, 0xFF])
def test_what_is_no_number_stays_so(byte: int) -> None:
    values = torch.tensor([0x38, byte], dtype=torch.uint8).view(DTYPE)
    assert decode(values, torch.empty(2)).tolist() == [1.0, pytest.approx(float("nan"), nan_ok=True)]
    assert decode(values, torch.empty(2), torch.tensor([3.0])).tolist() == [
        3.0,
        pytest.approx(float("nan"), nan_ok=True),
    ]
    assert decode(ALL[:0], torch.empty(0), torch.empty(0)).shape == (0,)


def test_a_scale_that_reproduces_a_block_is_found_and_else_it_is_amax_over_448() -> None:
    generator = torch.Generator().manual_seed(1)
    values_NB = (torch.randn(40, 256, generator=generator) * 40).clamp(-MAX, MAX).to(DTYPE).float()
    values_NB[:, 0] = 0.0
    powers_N1 = 2.0 ** torch.randint(-20, -5, (40, 1), generator=generator)
    blocks_NB = values_NB * powers_N1
    blocks_NB[:5] = torch.randn(5, 256, generator=generator)
    blocks_NB[5] = 0.0
    amax_N = blocks_NB.abs().amax(1)
    scale_N = exact_scales(amax_N, blocks_NB[:, :PROBE], lambda chosen: blocks_NB[chosen])
    again_NB = (blocks_NB / scale_N[:, None]).clamp(-MAX, MAX).to(DTYPE).float() * scale_N[:, None]
    assert torch.equal(again_NB[6:], blocks_NB[6:])
    assert torch.equal(scale_N[:5], amax_N[:5] / MAX)
    assert scale_N[5] == 1.0
    assert (scale_N[6:] != amax_N[6:] / MAX).any()
