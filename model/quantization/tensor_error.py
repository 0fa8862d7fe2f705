"""Error of quantized weights: relative and largest error, share of clipped values, measured in strips of rows.

Shapes: O output channel, I input channel, R row of a strip, N value of a row or a strip, S saturated value of a strip.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Values of a strip: its fp32 buffers, 1 MiB each, stay in a core's caches, and an operation takes longer than its call.
_STRIP_VALUES = 1 << 18


class Codes(NamedTuple):
    """Stored numbers of a weight, and which of them are at the end of the format's range."""

    stored: Tensor
    """Bytes, uint8."""
    per_byte: int
    """Numbers in a byte: 1, or 2 of four bits, the earlier one in the lower half."""
    saturated: Callable[[Tensor], Tensor]
    """Which numbers, a byte each, are the largest or the smallest, bool."""
    ratio: float
    """Magnitude beyond which a value is clipped and not rounded to the end of the range, over that end."""


def find_codes(stored: Mapping[str, Tensor], name: str, shape: torch.Size) -> Codes | None:
    """The numbers that one weight [O, I] is stored as; `None` when they are of no known layout.

    Known are 8-bit integers and e4m3 of the weight's own shape, and two four-bit numbers a byte: integers with 8 added
    (compressed-tensors' pack-quantized, in 32-bit words) and e2m1 (its nvfp4-pack-quantized, in bytes).
    """
    for tensor in of_weight(stored, name).values():
        if tensor.dtype == torch.int8 and tensor.shape == shape:
            # 127, -128 and -127 are neighbours as bytes.
            return Codes(tensor.view(torch.uint8), 1, lambda codes: codes - 127 <= 2, 127.5 / 127)
        if tensor.dtype == torch.float8_e4m3fn and tensor.shape == shape:
            # The spacing below 448 is 32.
            return Codes(tensor.view(torch.uint8), 1, lambda codes: (codes & 0x7F) == 0x7E, 464 / 448)
        if tensor.dim() != 2 or tensor.shape[0] != shape[0]:
            continue
        if tensor.dtype == torch.int32 and tensor.shape[1] * 8 == shape[1]:
            return Codes(tensor.view(torch.uint8), 2, lambda codes: (codes == 15) | (codes == 0), 7.5 / 7)
        if tensor.dtype == torch.uint8 and tensor.shape[1] * 2 == shape[1]:
            # The spacing below 6 is 2.
            return Codes(tensor, 2, lambda codes: (codes & 7) == 7, 7 / 6)
    return None


def of_weight(stored: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """Stored tensors of one weight of a group, by name: those that begin with the name of its layer."""
    stem = name.removesuffix("weight")
    return {key: tensor for key, tensor in stored.items() if key.startswith(stem)}


def measure(weight: Tensor, restored: Tensor, codes: Codes | None) -> dict[str, Any]:
    """Figures of one weight as JSON values; no fp32 copy of it is made.

    `squared` and `error_squared` are sums over its values, `rel_error` the root of their ratio (Frobenius norms; 0 for
    a weight of zeros), `max_abs_error` is in the weight's unit, `clipped` the share of values beyond the range that the
    format represents under its scales (`None` where the stored numbers are of no known layout).

    Args:
        weight: any float type.
        restored: the weight that the stored tensors stand for, of the same shape.
    """
    squared, error_squared, largest, clipped = 0.0, 0.0, 0.0, 0
    weight_ON, restored_ON = _rows(weight), _rows(restored)
    rows = max(1, _STRIP_VALUES // max(1, weight_ON.shape[1]))
    for first in range(0, weight_ON.shape[0] if weight.numel() else 0, rows):
        strip_RN = weight_ON[first : first + rows].float()
        restored_RN = restored_ON[first : first + rows]
        if codes is not None:
            clipped += _clipped(
                strip_RN.reshape(-1), restored_RN.reshape(-1), codes, codes.stored[first : first + rows]
            )
        error_RN = restored_RN - strip_RN
        squared += _squared(strip_RN)
        error_squared += _squared(error_RN)
        low, high = torch.aminmax(error_RN)
        largest = max(largest, -float(low), float(high))
    return {
        "rel_error": math.sqrt(error_squared / squared) if squared else 0.0,
        "max_abs_error": largest,
        "clipped": None if codes is None else clipped / max(1, weight.numel()),
        "squared": squared,
        "error_squared": error_squared,
    }


def _squared(values_RN: Tensor) -> float:
    """Sum of squares; a row at a time, so that it is the same whatever the number of threads."""
    norm_R = torch.linalg.vector_norm(values_RN, dim=1)
    return math.fsum((norm_R.double() ** 2).tolist())


def _rows(tensor: Tensor) -> Tensor:
    return tensor.reshape(1, -1) if tensor.dim() < 2 else tensor.flatten(1)


def _clipped(strip_N: Tensor, restored_N: Tensor, codes: Codes, stored: Tensor) -> int:
    """Number of values of a strip that lie beyond the end of the range by more than rounding to it explains."""
    if codes.per_byte == 1:
        at_S = _places(codes.saturated(stored))
    else:
        halves = (codes.saturated(stored & 15), codes.saturated(stored >> 4))
        at_S = torch.cat([_places(half) * 2 + number for number, half in enumerate(halves)])
    if not at_S.numel():
        return 0
    # A scale that was rounded leaves a value at the very end of the range a unit in the last place beyond it.
    bound_S = restored_N[at_S].abs() * (codes.ratio * (1 + 1e-6))
    return int((strip_N[at_S].abs() > bound_S).sum())


def _places(found: Tensor) -> Tensor:
    """Flat indices of the few true values of a dense bool tensor."""
    flat = found.reshape(-1)
    if flat.numel() % 8:
        return flat.nonzero().reshape(-1)
    # Eight at a time: the search for non-zero values is by far the slowest step.
    words = flat.view(torch.int64).nonzero()
    inside = flat.view(-1, 8)[words.reshape(-1)].nonzero()
    return words[inside[:, 0], 0] * 8 + inside[:, 1]
