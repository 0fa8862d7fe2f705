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
_SEARCHED = 512


@dataclass(frozen=True)
class Fp8Channel(ChannelScheme):
    """Scheme of e4m3 values and a scale per output channel."""

    dtype, numbers, layout = DTYPE, "float", "float-quantized"

    def quantize_one(self, weight_OI: Tensor) -> tuple[Tensor, Tensor]:
        """See `quantize`."""
        return quantize(weight_OI)

    def restore(self, stored: Mapping[str, Tensor], rows: slice, out: Tensor) -> None:
        """Values times their row's scale."""
        decode(stored[""][rows], out, stored["_scale"][rows])

    def round_inputs(self, x_NI: Tensor) -> Tensor:
        """See `e4m3_per_token`."""
        return e4m3_per_token(x_NI)


def quantize(weight_OI: Tensor) -> tuple[Tensor, Tensor]:
    """e4m3 values [O, I] and fp32 scales [O, 1], each its row's largest magnitude over 448; a row of zeros gets 1.

    A row that was dequantized from this format is reproduced exactly.
    """
    values_OI = torch.empty(weight_OI.shape, dtype=DTYPE, device=weight_OI.device)
    scale_O1 = torch.cat([_scales(part_OI) for part_OI in torch.split(weight_OI, _SEARCHED)])
    work = scratch(weight_OI)
    for rows in strips(weight_OI):
        strip = work[: rows.stop - rows.start].copy_(weight_OI[rows])
        values_OI[rows] = strip.div_(scale_O1[rows])
    return values_OI, scale_O1


def _scales(weight_OI: Tensor) -> Tensor:
    """Scales [O, 1] of some rows."""
    amax_O = torch.cat([largest_magnitude(weight_OI[rows], 1) for rows in strips(weight_OI)])[:, 0].float()
    return exact_scales(amax_O, weight_OI[:, :PROBE].float(), lambda chosen: weight_OI[chosen].float())[:, None]
