"""int4 weights in groups of input channels: symmetric, one scale a group; packed eight to a 32-bit word.

The numbers and the packing are compressed-tensors' "pack-quantized": values -8 to 7, the scale a group's largest
magnitude over 7.5, value i of a row in bits 4 (i mod 8) of word i // 8, stored with 8 added.

Shapes: O output channel, I input channel, G group of input channels (the last may be partial), W 32-bit word.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

MIN, MAX = -8, 7
_PER_WORD = 8


def largest_scale(weight_OI: Tensor, group: int) -> Tensor:
    """fp32 scales [O, G] that cover each group's largest magnitude; 1 for a group of zeros."""
    rows, columns = weight_OI.shape
    padded_OI = F.pad(weight_OI.float(), (0, -columns % group))
    amax_OG = padded_OI.view(rows, -1, group).abs().amax(dim=2)
    return torch.where(amax_OG > 0, amax_OG / ((MAX - MIN) / 2), 1.0)


def quantize(weight_OI: Tensor, scale_OG: Tensor, group: int) -> Tensor:
    """int8 tensor [O, I] of values -8 to 7, to the nearest."""
    return (weight_OI.float() / _widen(scale_OG, group, weight_OI.shape[1])).round_().clamp_(MIN, MAX).to(torch.int8)


def dequantize(values_OI: Tensor, scale_OG: Tensor, group: int) -> Tensor:
    """fp32 values * scale [O, I]."""
    return values_OI.float() * _widen(scale_OG.float(), group, values_OI.shape[1])


def pack(values_OI: Tensor) -> Tensor:
    """int32 words [O, W] of int8 values [O, I] that lie in -8 to 7."""
    rows, columns = values_OI.shape
    padded_OI = F.pad(values_OI.to(torch.int64) - MIN, (0, -columns % _PER_WORD))
    words_OW = (padded_OI.view(rows, -1, _PER_WORD) << _shifts(values_OI.device)).sum(dim=2)
    return torch.where(words_OW >= 1 << 31, words_OW - (1 << 32), words_OW).to(torch.int32)


def unpack(words_OW: Tensor, columns: int) -> Tensor:
    """int8 values [O, columns] of int32 words [O, W]; the reverse of `pack`."""
    values_OWV = (words_OW.to(torch.int64)[:, :, None] >> _shifts(words_OW.device)) & 0xF
    return (values_OWV.flatten(1)[:, :columns] + MIN).to(torch.int8)


def words(columns: int) -> int:
    """Number of 32-bit words that hold a row of this many values."""
    return math.ceil(columns / _PER_WORD)


def _shifts(device: torch.device) -> Tensor:
    return torch.arange(0, 32, 4, device=device)


def _widen(scale_OG: Tensor, group: int, columns: int) -> Tensor:
    """Scale of each input channel [O, I]."""
    return scale_OG.repeat_interleave(group, dim=1)[:, :columns]
