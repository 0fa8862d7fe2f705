"""NVFP4: numbers and layout against a slow reference, value by value in float64."""

import math

import pytest
import torch
from compressed_tensors.quantization import QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from torch import Tensor

from model.numerics.nvfp4 import Nvfp4, decode, encode, global_scale, quantize

NUMBERS = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def nearest(value: float, numbers: list[float]) -> int:
    """Index of the number nearest to a value's magnitude; of two, that of the even one."""
    return min(range(len(numbers)), key=lambda code: (abs(numbers[code] - abs(value)), code % 2))


def by_hand(weight: Tensor, tensor_scale: float) -> tuple[list[list[int]], list[list[float]]]:
    """Code of each value and scale of each block, under the tensor's scale."""
    e4m3 = sorted({m * 2.0**-9 for m in range(8)} | {m * 2.0**e for m in range(8, 16) for e in range(-9, 6)})
    e4m3 = [number for number in e4m3 if number <= 448.0]
    codes, scales = [], []
    for row in weight.double().tolist():
        row_codes, row_scales = list[int](), list[float]()
        for first in range(0, len(row), 16):
            block = row[first : first + 16]
            exact = min(448.0, max(abs(value) for value in block) / 6.0 * tensor_scale)
            scale = e4m3[nearest(exact, e4m3)] or 0.125
            row_scales.append(scale)
            for value in block:
                code = nearest(value / (scale / tensor_scale), NUMBERS)
                row_codes.append(code + 8 * (math.copysign(1.0, value) < 0))
        codes.append(row_codes)
        scales.append(row_scales)
    return codes, scales


def test_numbers_and_layout_are_those_of_the_reference() -> None:
    weight = torch.randn(24, 64, generator=torch.Generator().manual_seed(0)) * torch.logspace(-4, 0, 24)[:, None]
    weight[3, 16:32] = 0.0
    weight[5, 0] = 11.0
    (stored,) = Nvfp4().quantize([weight])
    tensor_scale = stored["_global_scale"].item()
    assert tensor_scale == pytest.approx(448 * 6 / 11, rel=2**-22)
    codes, scales = by_hand(weight, tensor_scale)
    assert stored["_scale"].float().tolist() == scales
    assert stored["_packed"].tolist() == [
        [low | high << 4 for low, high in zip(row[::2], row[1::2], strict=True)] for row in codes
    ]
    out = torch.empty(24, 64)
    Nvfp4().dequantize(stored, out)
    for row in range(24):
        for column in range(64):
            code, scale = codes[row][column], scales[row][column // 16]
            value = NUMBERS[code % 8] * (-1.0 if code >= 8 else 1.0) * scale / tensor_scale
            assert out[row, column].item() == pytest.approx(value, rel=2e-7)


def test_all_codes_and_the_borders_between_them() -> None:
    codes = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(16, 16)
    assert torch.equal(encode(decode(codes)), codes)
    borders = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 7.0]
    even = [0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, 6.0]
    assert decode(encode(torch.tensor([borders]))).tolist() == [even]
    above = torch.tensor([borders]).nextafter(torch.tensor(math.inf))
    assert decode(encode(above)).tolist() == [[0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 6.0]]
    assert decode(encode(torch.tensor([[-0.1, -0.0, 0.0, 0.1]]))).signbit().tolist() == [[True, True, False, False]]


def test_weights_that_are_quantized_together_share_the_global_scale() -> None:
    gate, up = torch.full((2, 16), 0.5), torch.full((2, 32), -4.0)
    stored = Nvfp4().quantize([gate, up])
    assert [one["_global_scale"].item() for one in stored] == [448 * 6 / 4.0] * 2
    assert stored[0]["_scale"].float().tolist() == [[56.0], [56.0]]
    outs = [torch.empty(2, 16), torch.empty(2, 32)]
    for one, out in zip(stored, outs, strict=True):
        Nvfp4().dequantize(one, out)
    assert torch.equal(outs[0], gate)
    assert torch.equal(outs[1], up)


@pytest.mark.parametrize("largest", [0.0, 1e-38])
def test_a_tensor_of_zeros_or_nearly_has_a_finite_scale(largest: float) -> None:
    assert global_scale(torch.tensor(largest)).isfinite().all()
    (stored,) = Nvfp4().quantize([torch.full((1, 16), largest)])
    out = torch.empty(1, 16)
    Nvfp4().dequantize(stored, out)
    assert out.abs().max() <= largest


def test_compressed_tensors_chooses_the_same_scales() -> None:
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(2)) * torch.logspace(-5, 1, 64)[:, None]
    weight[3, 16:32] = 0.0
    described = QuantizationScheme.model_validate({"targets": ["Linear"], **Nvfp4().config})
    theirs = generate_gparam(weight.min(), weight.max())
    blocks = weight.view(64, -1, 16)
    scales, _ = calculate_qparams(blocks.amin(2), blocks.amax(2), described.weights, global_scale=theirs)
    ours = global_scale(weight.abs().max())
    assert torch.equal(ours, theirs)
    assert torch.equal(quantize(weight, ours)[1].float(), scales)
