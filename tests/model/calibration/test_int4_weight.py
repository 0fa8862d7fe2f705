import torch

from model.calibration.int4_weight import Int4Weight, better_rows, nearest, with_scale
from tests.model.calibration.inputs import weight


def test_values_are_chosen_for_the_scale_as_it_is_stored():
    weight_OI = torch.randn(16, 96, generator=torch.Generator().manual_seed(0))
    rounded = nearest(weight_OI, 32, torch.bfloat16)
    assert rounded.scale_OG.dtype == torch.bfloat16
    assert rounded.scale_OG.shape == (16, 3)
    scale_OI = rounded.scale_OG.float().repeat_interleave(32, dim=1)
    assert torch.equal(rounded.dequantized(), rounded.values_OI.float() * scale_OI)
    for step in (-1, 1):
        moved_OI = rounded.values_OI + step
        other = Int4Weight(moved_OI, rounded.scale_OG, 32).dequantized()
        nearer_OI = (other - weight_OI).abs() < (rounded.dequantized() - weight_OI).abs() - 1e-6
        assert not (nearer_OI & (moved_OI >= -8) & (moved_OI <= 7)).any()


def test_each_row_is_taken_from_where_its_output_is_nearer():
    weight_OI = weight(4, 32)
    good = nearest(weight_OI, 32, torch.float32)
    bad = with_scale(weight_OI, good.scale_OG * 3, 32)
    mixed = Int4Weight(*(torch.cat([g[:2], b[2:]]) for g, b in zip(good[:2], bad[:2], strict=True)), 32)
    other = Int4Weight(*(torch.cat([b[:2], g[2:]]) for g, b in zip(good[:2], bad[:2], strict=True)), 32)
    found = better_rows(weight_OI, torch.eye(32), mixed, other)
    assert torch.equal(found.values_OI, good.values_OI)
    assert torch.equal(found.scale_OG, good.scale_OG)
