import pytest
import torch

from model.numerics.int4_groups import dequantize, largest_scale, pack, quantize, unpack, words


@pytest.mark.parametrize("columns", [8, 128, 256, 261])
def test_the_error_is_at_most_half_a_scale_also_in_a_partial_group(columns):
    weight_OI = torch.randn(7, columns, generator=torch.Generator().manual_seed(0))
    scale_OG = largest_scale(weight_OI, 128)
    assert scale_OG.shape == (7, -(-columns // 128))
    error_OI = (dequantize(quantize(weight_OI, scale_OG, 128), scale_OG, 128) - weight_OI).abs()
    assert (error_OI <= scale_OG.repeat_interleave(128, 1)[:, :columns] * 0.5001).all()


def test_a_group_of_zeros_stays_zeros():
    weight_OI = torch.zeros(2, 256)
    weight_OI[0, 0] = 1.0
    scale_OG = largest_scale(weight_OI, 128)
    assert scale_OG.tolist() == [[pytest.approx(1 / 7.5), 1.0], [1.0, 1.0]]
    assert torch.equal(dequantize(quantize(weight_OI, scale_OG, 128), scale_OG, 128)[1], torch.zeros(256))


def test_words_hold_eight_values_the_first_in_the_lowest_bits():
    values_OI = torch.tensor([[-8, -7, 0, 1, 2, 3, 7, -1, 5]], dtype=torch.int8)
    packed_OW = pack(values_OI)
    assert packed_OW.dtype == torch.int32
    assert packed_OW.shape == (1, words(9)) == (1, 2)
    assert packed_OW[0, 0].item() & 0xFFFFFFFF == 0x7FBA9810
    assert torch.equal(unpack(packed_OW, 9), values_OI)
