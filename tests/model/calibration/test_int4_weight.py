import torch

from model.calibration.int4_weight import Int4Weight, nearest


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
