"""Search of group scales: below the one that covers the largest magnitude, where clipping costs less than rounding.

A grid over the scale, as AutoGPTQ's `mse` option and AWQ's clipping search (arXiv 2306.00978, section 3.2 and its
code) have it; they minimise the weights' error and the output's. Here it is the output's where a second moment is
known, within each group, and else the weights'.

Shapes: O output channel, I input channel, G group of input channels, X channel of a group.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from model.numerics.int4_groups import MAX, MIN, largest_scale

# The largest is that under which a positive extreme is not clipped: values end at +7, and amax / 7.5 is ratio 1.
_LARGEST, _SMALLEST, _POINTS = 7.5 / 7, 0.5, 40


def ratios() -> list[float]:
    """Candidate scales relative to amax / 7.5; 1 comes first, so that a tie stays with it."""
    step = (_LARGEST - _SMALLEST) / (_POINTS - 1)
    return [1.0, *(_LARGEST - step * point for point in range(_POINTS))]


def search_scale(weight_OI: Tensor, group: int, moment: Tensor | None, scale_dtype: torch.dtype) -> Tensor:
    """Scales [O, G] of the type given that minimise each group's squared error, over a grid.

    The error never exceeds that under amax / 7.5, which is a point of the grid.

    Args:
        moment: [I, I], the inputs' second moment: the error is that of the output, as far as it comes from the group;
            [I]: its diagonal alone; None: the error of the weights.
    """
    rows, columns = weight_OI.shape
    padding = -columns % group
    weight_GOX = F.pad(weight_OI.float(), (0, padding)).view(rows, -1, group).transpose(0, 1).contiguous()
    metric = _metric(moment, group, padding)
    base_GO1 = largest_scale(weight_OI, group).T[:, :, None]
    best_GO1 = torch.empty_like(base_GO1)
    least_GO1 = torch.full_like(base_GO1, torch.inf)
    for ratio in ratios():
        scale_GO1 = (base_GO1 * ratio).to(scale_dtype).float()
        rounded_GOX = (weight_GOX / scale_GO1).round_().clamp_(MIN, MAX).mul_(scale_GO1)
        error_GO1 = _error(rounded_GOX.sub_(weight_GOX), metric)
        better_GO1 = error_GO1 < least_GO1
        best_GO1 = torch.where(better_GO1, scale_GO1, best_GO1)
        least_GO1 = torch.where(better_GO1, error_GO1, least_GO1)
    return best_GO1[:, :, 0].T.contiguous().to(scale_dtype)


def _metric(moment: Tensor | None, group: int, padding: int) -> Tensor | None:
    """The moment's diagonal [G, 1, X], or its blocks on the diagonal [G, X, X]."""
    if moment is None:
        return None
    if moment.dim() == 1:
        return F.pad(moment.float(), (0, padding)).view(-1, 1, group)
    padded = F.pad(moment.float(), (0, padding, 0, padding))
    starts = range(0, padded.shape[0], group)
    return torch.stack([padded[start : start + group, start : start + group] for start in starts])


def _error(error_GOX: Tensor, metric: Tensor | None) -> Tensor:
    """Squared error [G, O, 1] under a metric."""
    if metric is None:
        return error_GOX.square().sum(dim=2, keepdim=True)
    weighted_GOX = error_GOX * metric if metric.shape[1] == 1 else error_GOX @ metric
    return (weighted_GOX * error_GOX).sum(dim=2, keepdim=True)
