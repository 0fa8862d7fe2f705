"""Activations rounded as engines round a quantized layer's inputs, and given back in their own type.

A layer that multiplies 8-bit numbers rounds its inputs when it runs, under scales of their largest magnitude: of each
token for weights with a scale a channel, of each 128 inputs of a token for weights in blocks (as vLLM 0.32 does).
Multiplying what these functions return by the dequantized weights gives such a layer's output up to the order of its
sums.

Shapes: N any leading dimensions, I input channel, G group.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from model.numerics.e4m3 import DTYPE as E4M3
from model.numerics.e4m3 import MAX as E4M3_MAX
from model.numerics.e4m3 import decode
from model.numerics.strips import largest_magnitude

# Where all inputs are smaller, they are taken as zeros: no 0 / 0.
_SMALLEST = 1e-30


def e4m3_per_token(x_NI: Tensor) -> Tensor:
    """Inputs rounded to e4m3, each token under its own scale."""
    return _to_e4m3(x_NI.float()).to(x_NI.dtype)


def e4m3_in_groups(x_NI: Tensor, group: int) -> Tensor:
    """Inputs rounded to e4m3, each `group` of a token's channels under its own scale; the last may be partial."""
    channels = x_NI.shape[-1]
    grouped = F.pad(x_NI.float(), (0, -channels % group)).view(*x_NI.shape[:-1], -1, group)
    return _to_e4m3(grouped).flatten(-2)[..., :channels].to(x_NI.dtype)


def _to_e4m3(x: Tensor) -> Tensor:
    """fp32 values rounded under one scale for the last dimension."""
    scale = input_scale(x, E4M3_MAX)
    quotient = x / scale
    return decode(quotient.to(E4M3), quotient).mul_(scale)


def input_scale(x: Tensor, largest: float) -> Tensor:
    """fp32 scales under which the last dimension's largest magnitude is `largest`; 1 for zeros."""
    magnitude = largest_magnitude(x, -1)
    return torch.where(magnitude > _SMALLEST, magnitude / largest, 1.0)
