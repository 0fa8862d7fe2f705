"""fp8 weights with one scale per output channel: compressed-tensors' "FP8 dynamic", e4m3 with activations per token.

Shapes: O output channel, I input channel.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from model.numerics.activations import e4m3_per_token
from model.numerics.e4m3 import DTYPE, PROBE, decode, exact_scales
from model.numerics.schemes import ChannelScheme
from model.numerics.strips import largest_magnitude, scratch, strips

# Rows whose scales are searched at once.
_CHUNK = 512


@dataclass(frozen=True)
class Fp8Channel(ChannelScheme):
    """Scheme of e4m3 values and a scale per output channel."""

    dtype, numbers, layout = DTYPE, "float", "float-quantized"

    def quantize_one(self, weight_OI: Tensor) -> tuple[Tensor, Tensor]:
        """See `quantize`."""
        return quantize(weight_OI)

    def dequantize(self, stored: Mapping[str, Tensor], out: Tensor) -> None:
        """Values times their row's scale."""
        work = scratch(out)
        for rows in strips(out):
            strip = decode(stored[""][rows], work[: rows.stop - rows.start])
            out[rows] = strip.mul_(stored["_scale"][rows])

    def round_inputs(self, x_NI: Tensor) -> Tensor:
        """See `e4m3_per_token`."""
        return e4m3_per_token(x_NI)


def quantize(weight_OI: Tensor) -> tuple[Tensor, Tensor]:
    """e4m3 values [O, I] and fp32 scales [O, 1], each its row's largest magnitude over 448; a row of zeros gets 1.

    A row that was dequantized from this format is reproduced exactly.
    """
    values_OI = torch.empty(weight_OI.shape, dtype=DTYPE, device=weight_OI.device)
    scale_O1 = torch.empty(weight_OI.shape[0], 1, device=weight_OI.device)
    for first in range(0, weight_OI.shape[0], _CHUNK):
        _quantize_chunk(weight_OI[first : first + _CHUNK], values_OI[first:], scale_O1[first : first + _CHUNK])
    return values_OI, scale_O1


def _quantize_chunk(weight_OI: Tensor, values_OI: Tensor, scale_O1: Tensor) -> None:
    """Fill the first rows of `values_OI`, and `scale_O1`."""
    work = scratch(weight_OI)
    for rows in strips(weight_OI):
        scale_O1[rows] = largest_magnitude(work[: rows.stop - rows.start].copy_(weight_OI[rows]), 1)
    probe_OP = weight_OI[:, :PROBE].float()
    scale_O1[:, 0] = exact_scales(scale_O1[:, 0].clone(), probe_OP, lambda chosen: weight_OI[chosen].float())
    for rows in strips(weight_OI):
        strip = work[: rows.stop - rows.start].copy_(weight_OI[rows])
        values_OI[rows] = strip.div_(scale_O1[rows])
