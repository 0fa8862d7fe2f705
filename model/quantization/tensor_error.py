"""Error of quantized weights: relative and largest error, share of clipped values, measured in strips of rows.

Shapes: O output channel, I input channel, R row of a strip, N value of a row. H by P are all numbers of a strip, and S
those of the P that hold one at the end of the range.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from model.numerics.formats import Restore
from model.numerics.fp8_blocks import BLOCK, scale_shape
from model.numerics.strips import as_rows, largest_magnitude, scratch, strips

# A scale that was rounded leaves a value at the very end of the range a unit in the last place beyond it.
_SLACK = 1e-6
# Numbers that are searched together for one at the end of the range, by the numbers in a byte: of 8 bits few are there,
# of 4 every sixtieth.
_TOGETHER = {1: 32, 2: 8}


class Codes(NamedTuple):
    """Stored numbers of a weight, and which of them are at the end of the format's range."""

    stored: Tensor
    """Bytes, uint8."""
    per_byte: int
    """Numbers in a byte: 1, or 2 of four bits, the earlier one in the lower half."""
    magnitude: Callable[[Tensor], Tensor]
    """Integers, of numbers that are a byte each, that are `end` or more for those at the end of the range."""
    end: int
    ratio: float
    """Magnitude beyond which a value is clipped and not rounded to the end of the range, over that end."""
    limit: Tensor | None = None
    """Error up to which no value of a row [O, 1], or of a block of 128 by 128, can be clipped; `None`: not known."""


def find_codes(stored: Mapping[str, Tensor], name: str, shape: torch.Size) -> Codes | None:
    """The numbers that one weight [O, I] is stored as; `None` when they are of no known layout.

    Known are 8-bit integers and e4m3 of the weight's own shape, and two four-bit numbers a byte: integers with 8 added
    (compressed-tensors' pack-quantized, in 32-bit words) and e2m1 (its nvfp4-pack-quantized, in bytes).
    """
    own = of_weight(stored, name)
    for tensor in own.values():
        if tensor.dtype == torch.int8 and tensor.shape == shape:
            # -127 is at the end as well as -128, whose magnitude is 128 in an unsigned byte.
            limit = _limit(own, shape, 127.0, ratio := 127.5 / 127)
            return Codes(
                tensor.view(torch.uint8), 1, lambda c: c.view(torch.int8).abs().view(torch.uint8), 127, ratio, limit
            )
        if tensor.dtype == torch.float8_e4m3fn and tensor.shape == shape:
            # The spacing below 448 is 32.
            limit = _limit(own, shape, 448.0, ratio := 464 / 448)
            return Codes(tensor.view(torch.uint8), 1, lambda c: c & 0x7F, 0x7E, ratio, limit)
        if tensor.dim() != 2 or tensor.shape[0] != shape[0]:
            continue
        if tensor.dtype == torch.int32 and tensor.shape[1] * 8 == shape[1]:
            # Twice the distance from the middle, which is 7.5: -8 is as far from it as 7.
            return Codes(tensor.view(torch.uint8), 2, lambda c: (c.view(torch.int8) * 2 - 15).abs(), 15, 7.5 / 7)
        if tensor.dtype == torch.uint8 and tensor.shape[1] * 2 == shape[1]:
            # The spacing below 6 is 2.
            return Codes(tensor, 2, lambda c: c & 7, 7, 7 / 6)
    return None


def _limit(own: Mapping[str, Tensor], shape: torch.Size, end: float, ratio: float) -> Tensor | None:
    """`Codes.limit` of values up to `end` times their scale."""
    for tensor in own.values() if len(shape) == 2 else ():
        if tensor.dtype == torch.float32 and tuple(tensor.shape) in ((shape[0], 1), scale_shape(shape)):
            return tensor * (end * (ratio * (1 + _SLACK) - 1))
    return None


def of_weight(stored: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """Stored tensors of one weight of a group, by name: those that begin with the name of its layer."""
    stem = name.removesuffix("weight")
    return {key: tensor for key, tensor in stored.items() if key.startswith(stem)}


def measure(weight: Tensor, restore: Restore, codes: Codes | None) -> dict[str, Any]:
    """Figures of one weight as JSON values; only strips of it are made in fp32, which stay in a core's caches.

    `squared` and `error_squared` are sums over its values, `rel_error` the root of their ratio (Frobenius norms; 0 for
    a weight of zeros), `max_abs_error` is in the weight's unit, `clipped` the share of values beyond the range that the
    format represents under its scales (`None` where the stored numbers are of no known layout).

    Args:
        weight: any float type.
        restore: sets fp32 memory to rows of the weight that the stored tensors stand for.
    """
    weight_ON = as_rows(weight)
    in_blocks = codes is not None and codes.limit is not None and len(codes.limit) != len(weight_ON)
    # Norms of rows, so that the sums are the same whatever the number of threads.
    norm_O, error_norm_O = torch.zeros(2, len(weight_ON), device=weight.device)
    strip_memory, restored_memory = scratch(weight_ON), scratch(weight_ON)
    largest, clipped = 0.0, 0
    for rows in strips(weight_ON, BLOCK if in_blocks else None) if weight.numel() else ():
        strip_RN = strip_memory[: rows.stop - rows.start].copy_(weight_ON[rows])
        restored_RN = restored_memory[: rows.stop - rows.start]
        restore(rows, restored_RN)
        error_RN = restored_RN.sub_(strip_RN)
        torch.linalg.vector_norm(strip_RN, dim=1, out=norm_O[rows])
        torch.linalg.vector_norm(error_RN, dim=1, out=error_norm_O[rows])
        largest_error = _largest_of_blocks(error_RN) if in_blocks else largest_magnitude(error_RN, 1)
        largest = max(largest, float(largest_error.amax()))
        if codes is not None and not _is_within(largest_error, codes.limit, rows.start // BLOCK if in_blocks else rows):
            restore(rows, restored_RN)
            clipped += _clipped(strip_RN, restored_RN, codes, codes.stored[rows])
    squared, error_squared = (math.fsum((norms.double() ** 2).tolist()) for norms in (norm_O, error_norm_O))
    return {
        "rel_error": math.sqrt(error_squared / squared) if squared else 0.0,
        "max_abs_error": largest,
        "clipped": None if codes is None else clipped / max(1, weight.numel()),
        "squared": squared,
        "error_squared": error_squared,
    }


def _largest_of_blocks(error_RN: Tensor) -> Tensor:
    """Largest magnitudes of a strip of one row of blocks, one for each of these."""
    return F.pad(largest_magnitude(error_RN, 0), (0, -error_RN.shape[1] % BLOCK)).view(-1, BLOCK).amax(1)


def _is_within(largest_error: Tensor, limit: Tensor | None, place: slice | int) -> bool:
    """Whether a strip's errors rule out that a value is clipped; not where an error is no number."""
    return limit is not None and bool((largest_error <= limit[place]).all())


def _clipped(strip_RN: Tensor, restored_RN: Tensor, codes: Codes, stored: Tensor) -> int:
    """Number of values of a strip that lie beyond the end of the range by more than rounding to it explains."""
    clipped, height = 0, math.gcd(stored.numel(), _TOGETHER[codes.per_byte])
    for number in range(codes.per_byte):
        numbers = stored if codes.per_byte == 1 else stored >> 4 if number else stored & 15
        magnitude_HP = codes.magnitude(numbers).view(height, -1)
        # Comparing bytes and searching among them takes a CPU far longer than the largest of many.
        at_S = (magnitude_HP.amax(0) >= codes.end).nonzero().view(-1)
        values_HS, restored_HS = (
            values_RN.view(height, -1, codes.per_byte)[:, :, number].index_select(1, at_S).abs_()
            for values_RN in (strip_RN, restored_RN)
        )
        beyond_HS = values_HS > restored_HS.mul_(codes.ratio * (1 + _SLACK))
        clipped += int(beyond_HS.logical_and_(magnitude_HP.index_select(1, at_S) >= codes.end).sum())
    return clipped
