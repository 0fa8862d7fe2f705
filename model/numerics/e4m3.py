"""e4m3 numbers (fp8): decoding at the memory's speed, and scales under which values are reproduced exactly.

Shapes: N block of values that share a scale, B value of a block, P the first few of them, C candidate scale,
S significand.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

DTYPE = torch.float8_e4m3fn
# Largest value of e4m3.
MAX = 448.0
# e4m3's significands in its top octave: the largest value of a block whose scale is not amax / 448 (a scale that is a
# power of two, for one) is one of these times a power of two, which the scale can take over.
_SIGNIFICANDS = (448.0, 416.0, 384.0, 352.0, 320.0, 288.0, 256.0, 240.0)
# Below it fp32 has fewer bits; the values of a block that are so small are taken as zeros.
_SMALLEST = torch.finfo(torch.float32).tiny
# This many values of a block rule out nearly all scales that do not reproduce it.
PROBE = 8
_FIRST = 2
# An fp16 number with e4m3's bits behind its sign, and its exponent's first bit clear, is the value times 2^-8.
_FROM_HALF = 256.0
_WITHOUT_FIRST_EXPONENT_BIT = -0x4001
# What is no number has all of these bits.
_WITHOUT_SIGN = 0x7F


def decode(values: Tensor, out: Tensor) -> Tensor:
    """`out`, fp32, set to the e4m3 `values` of the same shape.

    On a CPU by moving the bits into fp16: torch 2.13's own conversion goes value by value, eight times slower. What
    that would get wrong, the two numbers that are no number, is found by its bits and left to torch.
    """
    if values.device.type != "cpu":
        return out.copy_(values)
    signed = values.view(torch.int8)
    if signed.numel() and (signed & _WITHOUT_SIGN).amax().item() == _WITHOUT_SIGN:
        return out.copy_(values)
    # A CPU multiplies faster than it shifts.
    bits = signed.to(torch.int16).mul_(1 << 7).bitwise_and_(_WITHOUT_FIRST_EXPONENT_BIT)
    return out.copy_(bits.view(torch.float16)).mul_(_FROM_HALF)


def exact_scales(amax_N: Tensor, probe_NP: Tensor, blocks: Callable[[Tensor], Tensor]) -> Tensor:
    """fp32 scales [N]: amax / 448, or where it does not reproduce a block exactly, another one that does; 1 for zeros.

    A block that was dequantized from e4m3 is so found again. A scale that was amax / 448, rounded once, is the first
    candidate; another one (a power of two, or one unit beside it, as inexact division leaves it) is among the others.
    Values over their scale are at most 448, but for fp32's last bit: they need no clamping.

    Args:
        amax_N: largest magnitude of each block.
        probe_NP: some values of each block, fp32.
        blocks: function of block numbers [n] that returns these blocks' values, fp32 [n, B].
    """
    exact_N = amax_N / MAX
    scale_N = torch.where(exact_N >= _SMALLEST, exact_N, 1.0)
    candidates_CN = _candidates(amax_N)
    # A weight that was trained further fails here for nearly every candidate, mostly by its first values.
    if not _reproduces(probe_NP[:, :_FIRST], candidates_CN).any():
        return scale_N
    fits_CN = _reproduces(probe_NP, candidates_CN) & (exact_N >= _SMALLEST)
    open_N = fits_CN.any(dim=0)
    if not open_N.any():
        return scale_N
    for candidate_N, fits_N in zip(candidates_CN, fits_CN, strict=True):
        if (tried := (open_N & fits_N).nonzero().flatten()).numel():
            found = tried[_reproduces(blocks(tried), candidate_N[None, tried])[0]]
            scale_N[found] = candidate_N[found]
            open_N[found] = False
    return scale_N


def _candidates(amax_N: Tensor) -> Tensor:
    """Scales [C, N] and their fp32 neighbours that make a block's largest value one of e4m3's; amax / 448 first."""
    scale_SN = amax_N / torch.tensor(_SIGNIFICANDS, device=amax_N.device)[:, None]
    near = [scale_SN.nextafter(amax_N.new_tensor(end)) for end in (0.0, math.inf)]
    return torch.cat([scale_SN, *near])


def _reproduces(blocks_NB: Tensor, scale_CN: Tensor) -> Tensor:
    """Whether rounding block n under scale [c, n] changes nothing, bool [C, N]."""
    scale_CN1 = scale_CN[..., None]
    quotient_CNB = (blocks_NB / scale_CN1).clamp_(-MAX, MAX)
    rounded_CNB = decode(quotient_CNB.to(DTYPE), quotient_CNB).mul_(scale_CN1)
    return (rounded_CNB == blocks_NB).all(dim=-1)
