"""int8 weights: symmetric, one fp32 scale per output channel.

On disk it is compressed-tensors' "int-quantized" W8A8: static weights per channel, dynamic activations per token. The
embedded engine keeps activations as they are; one that follows config.json, like vLLM, rounds them to int8 as well, and
an evaluation does as that one does (model/numerics/modules.py, `round_inputs_of`).

Shapes: O output channel, I input channel.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from model.numerics.activations import input_scale
from model.numerics.schemes import ChannelScheme
from model.numerics.strips import largest_magnitude, scratch, strips

_MAX = 127
# Below it fp32 has fewer bits; the values of such a row are taken as zeros.
_SMALLEST = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class Int8Channel(ChannelScheme):
    """Scheme of int8 values and a scale per output channel.

    It is described as W8A8: weight-only int8 is what runs here, but engines have kernels for it only in 32-bit words.
    """

    dtype, numbers, layout = torch.int8, "int", "int-quantized"

    def quantize_one(self, weight_OI: Tensor) -> tuple[Tensor, Tensor]:
        """See `quantize`."""
        return quantize(weight_OI)

    def restore(self, stored: Mapping[str, Tensor], rows: slice, out: Tensor) -> None:
        """Values times their row's scale."""
        out.copy_(stored[""][rows]).mul_(stored["_scale"][rows])

    def round_inputs(self, x_NI: Tensor) -> Tensor:
        """Inputs rounded to int8, each token under its own scale."""
        x = x_NI.float()
        scale = input_scale(x, _MAX)
        return (x / scale).round_().mul_(scale).to(x_NI.dtype)


def quantize(weight_OI: Tensor) -> tuple[Tensor, Tensor]:
    """int8 values [O, I] and fp32 scales [O, 1] with weight ~ values * scale.

    The scale is the row's largest magnitude over 127, so the error is at most half a scale. A row of zeros (or
    of nothing above 1e-36) gets scale 1.
    """
    values_OI = torch.empty(weight_OI.shape, dtype=torch.int8, device=weight_OI.device)
    scale_O1 = torch.empty(weight_OI.shape[0], 1, device=weight_OI.device)
    work = scratch(weight_OI)
    for rows in strips(weight_OI):
        exact_O1 = largest_magnitude(weight_OI[rows], 1).float().div_(_MAX)
        # No value needs clamping: a scale that is a normal number is off by half of its last bit at most.
        scale_O1[rows] = torch.where(exact_O1 >= _SMALLEST, exact_O1, 1.0)
        strip = work[: rows.stop - rows.start].copy_(weight_OI[rows])
        values_OI[rows] = strip.div_(scale_O1[rows]).round_()
    return values_OI, scale_O1
