"""DeepSeek's fp8 weight format: e4m3 values in 128 x 128 blocks with one fp32 scale each, quantized and dequantized.

Shapes: O output channel, I input channel; scales are ceil(O / 128) x ceil(I / 128). N block, B = 128 * 128 values of
a block, P the first few of them, C candidate scale.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

SCALE_SUFFIX = "_scale_inv"
# weight_block_size of the released config.json.
BLOCK = 128
DTYPE = torch.float8_e4m3fn
# Largest value of e4m3.
_MAX = 448.0
# e4m3's significands in its top octave: the largest value of a block whose scale is not amax / 448 (a scale that is a
# power of two, for one) is one of these times a power of two, which the scale can take over.
_SIGNIFICANDS = (448.0, 416.0, 384.0, 352.0, 320.0, 288.0, 256.0, 240.0)
# This many values of a block rule out most scales that do not reproduce it.
_PROBE = 64


def scale_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """Shape of the scales of a weight [O, I]; the last block of a dimension may be partial."""
    return math.ceil(shape[0] / BLOCK), math.ceil(shape[1] / BLOCK)


def quantization_config() -> dict[str, Any]:
    """`quantization_config` of the released config.json."""
    return {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [BLOCK, BLOCK],
    }


def dequantize_blocks(values_OI: Tensor, scale: Tensor, *, row: int = 0, column: int = 0) -> Tensor:
    """values[i, j] * scale[i // 128, j // 128], fp32 [O, I].

    Args:
        row: offset of the first row in its block, 0 to 127, when the values are a slice of a weight; `scale` then
            begins with that block.
        column: offset of the first column in its block, 0 to 127.
    """
    result = values_OI.float()
    rows, columns = result.shape
    wide = scale.float().repeat_interleave(BLOCK, 1)[:, column : column + columns]
    for block, scale_I in enumerate(wide):
        result[max(0, block * BLOCK - row) : min(rows, (block + 1) * BLOCK - row)] *= scale_I
    return result


def quantize_blocks(weight_OI: Tensor) -> tuple[Tensor, Tensor]:
    """e4m3 values [O, I] and fp32 scales, each its block's largest magnitude over 448; a block of zeros gets scale 1.

    A block that was dequantized from this format is reproduced exactly. A scale that was amax / 448, rounded once, is
    found again directly; another one (a power of two, or one unit beside it, as inexact division leaves it) often is
    not, so where amax / 448 does not reproduce the block, the scales that could have are tried.
    """
    rows, columns = weight_OI.shape
    height, width = scale_shape(weight_OI.shape)
    padded = F.pad(weight_OI.float(), (0, width * BLOCK - columns, 0, height * BLOCK - rows))
    values_OI = torch.empty(rows, columns, dtype=DTYPE, device=weight_OI.device)
    scale = torch.empty(height, width, device=weight_OI.device)
    for block, strip in enumerate(torch.split(padded, BLOCK)):
        blocks_NB = strip.view(BLOCK, width, BLOCK).transpose(0, 1).reshape(width, -1)
        scale[block] = _scales(blocks_NB)
        values_NB = _round(blocks_NB, scale[block])
        strip_values = values_NB.view(width, BLOCK, BLOCK).transpose(0, 1).reshape(BLOCK, -1)
        first = block * BLOCK
        values_OI[first : first + BLOCK] = strip_values[: rows - first, :columns]
    return values_OI, scale


def _round(blocks_NB: Tensor, scale_N: Tensor) -> Tensor:
    return (blocks_NB / scale_N[:, None]).clamp_(-_MAX, _MAX).to(DTYPE)


def _scales(blocks_NB: Tensor) -> Tensor:
    """amax / 448 of each block, or where it does not reproduce the block exactly, another scale that does."""
    amax_N = blocks_NB.abs().amax(dim=1)
    scale_N = torch.where(amax_N > 0, amax_N / _MAX, 1.0)
    candidates_CN = _candidates(amax_N)
    probe_NP = blocks_NB[:, :_PROBE].contiguous()
    # A weight that was trained further fails here for nearly every candidate.
    fits_CN = _reproduces(probe_NP, candidates_CN) & (amax_N > 0)
    open_N = fits_CN.any(dim=0)
    for candidate_N, fits_N in zip(candidates_CN, fits_CN, strict=True):
        if (tried := (open_N & fits_N).nonzero().flatten()).numel():
            found = tried[_reproduces(blocks_NB[tried], candidate_N[None, tried])[0]]
            scale_N[found] = candidate_N[found]
            open_N[found] = False
    return scale_N


def _candidates(amax_N: Tensor) -> Tensor:
    """Scales [C, N] and their fp32 neighbours that make a block's largest value one of e4m3's; amax / 448 first."""
    scales = [amax_N / significand for significand in _SIGNIFICANDS]
    ends = [torch.full_like(amax_N, end) for end in (0.0, math.inf)]
    return torch.stack([near for scale_N in scales for near in (scale_N, *(scale_N.nextafter(end) for end in ends))])


def _reproduces(blocks_NB: Tensor, scale_CN: Tensor) -> Tensor:
    """Whether rounding block n under scale [c, n] changes nothing, bool [C, N]."""
    scale_CN1 = scale_CN[..., None]
    rounded_CNB = (blocks_NB / scale_CN1).clamp_(-_MAX, _MAX).to(DTYPE).float().mul_(scale_CN1)
    return (rounded_CNB == blocks_NB).all(dim=-1)
