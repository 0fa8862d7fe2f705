"""int4 weight with its group scales, and the plain rounding that calibrated methods are compared with.

Shapes: O output channel, I input channel, G group of input channels.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from model.calibration.second_moment import output_error
from model.numerics.int4_groups import dequantize, largest_scale, quantize


class Int4Weight(NamedTuple):
    """int4 values [O, I] as int8 in -8 to 7, and one scale for each row and group of `group` input channels."""

    values_OI: Tensor
    scale_OG: Tensor
    """In the type that it is stored in: the values were chosen for the rounded scale."""
    group: int
    row_factor_O: Tensor | None = None
    """What AWQ multiplied the rows by before they were rounded, fp32; kept for routed experts, where `None` is 1."""
    column_factor_I: Tensor | None = None
    """The same of the columns."""

    def dequantized(self) -> Tensor:
        """fp32 weights [O, I], with the factors in them."""
        return dequantize(self.values_OI, self.scale_OG, self.group)


def with_scale(weight_OI: Tensor, scale_OG: Tensor, group: int) -> Int4Weight:
    """Weights rounded to the nearest under given scales."""
    return Int4Weight(quantize(weight_OI, scale_OG.float(), group), scale_OG, group)


def nearest(weight_OI: Tensor, group: int, scale_dtype: torch.dtype) -> Int4Weight:
    """Weights rounded to the nearest, under scales that cover each group's largest magnitude."""
    return with_scale(weight_OI, largest_scale(weight_OI, group).to(scale_dtype), group)


def better_rows(weight_OI: Tensor, moment_II: Tensor, first: Int4Weight, second: Int4Weight) -> Int4Weight:
    """Of each row the version whose output is nearer to the weight's, over inputs with this second moment."""
    weight_OI = weight_OI.float()
    first_O, second_O = (output_error(one.dequantized() - weight_OI, moment_II) for one in (first, second))
    first_O1 = (first_O <= second_O)[:, None]
    return Int4Weight(
        torch.where(first_O1, first.values_OI, second.values_OI),
        torch.where(first_O1, first.scale_OG, second.scale_OG),
        first.group,
    )
