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
# As few of them rule out all scales of random bf16 weights, where two sometimes fit one by chance (tried 2026-11-30).
_FIRST = 4
# An fp16 number with e4m3's bits behind its sign, and its exponent's first bit clear, is the value times 2^-8.
_FROM_HALF = 256.0
_WITHOUT_FIRST_EXPONENT_BIT = -0x4001
# Times 2^8 it is still finite. A weight in fp32 has smaller scales: 448 times this one is infinite.
_LARGEST_SCALE = 2.0**119.5


def decode(values: Tensor, out: Tensor, scale: Tensor | None = None) -> Tensor:
    """`out`, fp32, set to the e4m3 `values` of the same shape, times `scale` (fp32, broadcast to it) if that is given.

    On a CPU by moving the bits into fp16: torch 2.13's own conversion goes value by value, eight times slower. What
    that would get wrong, the two numbers that are no number, is found by its bits and left to torch.
    """
    if values.device.type != "cpu" or _has_nan(values):
        out.copy_(values)
        return out if scale is None else out.mul_(scale)
    # A CPU multiplies faster than it shifts.
    bits = values.view(torch.int8).to(torch.int16).mul_(1 << 7).bitwise_and_(_WITHOUT_FIRST_EXPONENT_BIT)
    out.copy_(bits.view(torch.float16))
    if scale is not None and scale.numel() and scale.amax().item() < _LARGEST_SCALE:
        # Both factors' powers of two are exact, so the product is rounded as that of value and scale.
        return out.mul_(scale * _FROM_HALF)
    out.mul_(_FROM_HALF)
    return out if scale is None else out.mul_(scale)


def _has_nan(values: Tensor) -> bool:
    """Whether any bits are 0x7F, the largest as a signed byte, or 0xFF, the largest as an unsigned one."""
    if not values.numel():
        return False
    return values.view(torch.int8).amax().item() == 0x7F or values.view(torch.uint8).amax().item() == 0xFF


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
