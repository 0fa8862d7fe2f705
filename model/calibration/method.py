"""How weights are rounded to int4 groups: the method's settings, and one weight rounded by it.

Shapes: O output channel, I input channel.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from model.calibration.descent import SWEEPS, descend
from model.calibration.gptq import DAMPENING, gptq
from model.calibration.int4_weight import Int4Weight, nearest, with_scale
from model.calibration.scale_search import search_scale
from model.calibration.second_moment import SecondMoment


@dataclass(frozen=True)
class Method:
    """Settings of the rounding; without any of gptq, search and awq it is round to nearest."""

    group: int = 128
    """Input channels that share a scale."""
    gptq: bool = True
    search: bool = True
    """Search each group's scale for the least error of the output; else it covers the group's largest magnitude."""
    awq: bool = False
    """Scale input channels first (model/calibration/awq.py)."""
    sweeps: int = SWEEPS
    """Passes of coordinate descent after GPTQ (model/calibration/descent.py)."""
    correct: bool = True
    """With GPTQ, down_proj makes up for what rounding gate and up changed (model/calibration/feed_forward.py)."""
    ordered: bool = False
    """GPTQ takes channels with large inputs first; scales are then fixed beforehand."""
    dampening: float = DAMPENING
    scale_dtype: torch.dtype = torch.bfloat16
    """Type that scales are stored in."""

    @property
    def needs_inputs(self) -> bool:
        """Whether rounding looks at the layer's inputs."""
        return self.gptq or self.search or self.awq

    @property
    def corrects(self) -> bool:
        """Whether a layer makes up for what the rounded ones before it changed in its inputs."""
        return self.gptq and self.correct

    def round(self, weight_OI: Tensor, moment: SecondMoment | None) -> Int4Weight:
        """int4 weight by these settings; without inputs (None, or none seen) no error but the weight's is known."""
        seen_II = None if moment is None or not moment.rows else moment.shrunk()
        if self.gptq and seen_II is not None:
            found = gptq(
                weight_OI,
                seen_II,
                self.group,
                self.scale_dtype,
                search=self.search,
                ordered=self.ordered,
                dampening=self.dampening,
            )
            return descend(weight_OI, seen_II, found, sweeps=self.sweeps)
        if self.search:
            return with_scale(weight_OI, search_scale(weight_OI, self.group, seen_II, self.scale_dtype), self.group)
        return nearest(weight_OI, self.group, self.scale_dtype)


# By name, as configurations have it (model/calibration/names.py).
_NAMED: Mapping[str, Mapping[str, Any]] = {
    "search": {"gptq": False},
    "gptq": {},
    "awq": {"gptq": False, "awq": True},
}


def named(name: str, group: int) -> Method:
    """Settings of a calibrated method.

    Args:
        name: one of `model.calibration.names.CALIBRATED`.
        group: input channels that share a scale.
    """
    return Method(group=group, **_NAMED[name])
