"""int4 weights in groups of input channels: symmetric, one scale a group; packed eight to a 32-bit word.

The numbers and the packing are compressed-tensors' "pack-quantized": values -8 to 7, the scale a group's largest
magnitude over 7.5, value i of a row in bits 4 (i mod 8) of word i // 8, stored with 8 added.

Shapes: O output channel, I input channel, G group of input channels (the last may be partial), W 32-bit word.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from model.numerics.schemes import Entry, Scheme, compressed_tensors_arguments, compressed_tensors_group
from model.numerics.strips import largest_magnitude, pack_nibbles, strips, unpack_nibbles

MIN, MAX = -8, 7
_PER_WORD = 8
# Engines multiply by the scales in the activations' type and round them to it when they load: values are chosen for
# the scale that is used.
_SCALE_DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Int4Groups(Scheme):
    """Scheme of packed int4 values (`_packed`), bf16 scales [O, G] (`_scale`) and the weight's shape (`_shape`)."""

    group: int
    """Input channels that share a scale; their number must be divisible by it."""

    joint = False

    @property
    def config(self) -> Mapping[str, Any]:
        """Weights alone: activations stay in 16 bits."""
        weights = compressed_tensors_arguments(num_bits=4, type="int", strategy="group", group_size=self.group)
        return compressed_tensors_group("pack-quantized", weights, None)

    def entries(self, rows: int, columns: int) -> Mapping[str, Entry]:
        """Words, scales and shape."""
        return {
            "_packed": Entry((rows, words(columns)), torch.int32),
            "_scale": Entry((rows, columns // self.group), _SCALE_DTYPE),
            "_shape": Entry((2,), torch.int64),
        }

    def shape(self, stored: Mapping[str, Tensor]) -> tuple[int, int]:
        """Shape from the scales: reading `_shape` would wait for a GPU."""
        rows, groups = stored["_scale"].shape
        return rows, groups * self.group

    def quantize(self, weights: Sequence[Tensor]) -> list[dict[str, Tensor]]:
        """To the nearest, under scales that cover each group's largest magnitude."""
        return [self._quantize(weight_OI) for weight_OI in weights]

    def store(self, values_OI: Tensor, scale_OG: Tensor) -> dict[str, Tensor]:
        """Stored tensors of given int8 values -8 to 7 and scales, by suffix."""
        shape = torch.tensor(values_OI.shape, dtype=torch.int64)
        return {"_packed": pack(values_OI), "_scale": scale_OG.to(_SCALE_DTYPE), "_shape": shape}

    def restore(self, stored: Mapping[str, Tensor], rows: slice, out: Tensor) -> None:
        """Values times their group's scale."""
        out.copy_(unpack(stored["_packed"][rows], out.shape[1]))
        out.view(*stored["_scale"][rows].shape, self.group).mul_(stored["_scale"][rows].float()[:, :, None])

    def round_inputs(self, x_NI: Tensor) -> Tensor:
        """Inputs as they are."""
        return x_NI

    def _quantize(self, weight_OI: Tensor) -> dict[str, Tensor]:
        values_OI = torch.empty(weight_OI.shape, dtype=torch.int8, device=weight_OI.device)
        scales = []
        for rows in strips(weight_OI):
            strip = weight_OI[rows].float()
            scales.append(largest_scale(strip, self.group).to(_SCALE_DTYPE))
            values_OI[rows] = quantize(strip, scales[-1].float(), self.group)
        return self.store(values_OI, torch.cat(scales))


def largest_scale(weight_OI: Tensor, group: int) -> Tensor:
    """fp32 scales [O, G] that cover each group's largest magnitude; 1 for a group of zeros."""
    amax_OG = largest_magnitude(_grouped(weight_OI.float(), group), 2)[:, :, 0]
    return torch.where(amax_OG > 0, amax_OG / ((MAX - MIN) / 2), 1.0)


def quantize(weight_OI: Tensor, scale_OG: Tensor, group: int) -> Tensor:
    """int8 tensor [O, I] of values -8 to 7, to the nearest."""
    rows, columns = weight_OI.shape
    quotient_OGI = _grouped(weight_OI.float(), group) / scale_OG[:, :, None]
    return quotient_OGI.round_().clamp_(MIN, MAX).to(torch.int8).view(rows, -1)[:, :columns]


def dequantize(values_OI: Tensor, scale_OG: Tensor, group: int) -> Tensor:
    """fp32 values * scale [O, I]."""
    rows, columns = values_OI.shape
    return (_grouped(values_OI.float(), group) * scale_OG.float()[:, :, None]).view(rows, -1)[:, :columns]


def pack(values_OI: Tensor) -> Tensor:
    """int32 words [O, W] of int8 values [O, I] that lie in -8 to 7."""
    padded_OI = F.pad(values_OI - MIN, (0, -values_OI.shape[1] % _PER_WORD)).contiguous().view(torch.uint8)
    return pack_nibbles(padded_OI).view(torch.int32)


def unpack(words_OW: Tensor, columns: int) -> Tensor:
    """int8 values [O, columns] of int32 words [O, W]; the reverse of `pack`."""
    nibbles_OI = unpack_nibbles(words_OW.contiguous().view(torch.uint8))
    return nibbles_OI.view(torch.int8).add_(MIN)[:, :columns]


def words(columns: int) -> int:
    """Number of 32-bit words that hold a row of this many values."""
    return math.ceil(columns / _PER_WORD)


def _grouped(weight_OI: Tensor, group: int) -> Tensor:
    """Values [O, G, group]; zeros fill a partial group."""
    rows, columns = weight_OI.shape
    return F.pad(weight_OI, (0, -columns % group)).view(rows, -1, group)
