"""Coordinate descent from a rounded weight: values and scales moved in turn, each to the least error of the output.

Each value in turn takes the best of its sixteen, given all others (Behdin et al. 2023, QuantEase, arXiv 2309.01885,
which begins from GPTQ's result as well); GPTQ decides on each column once, before those after it. Then all scales of a
row take their common least squares solution for the values as they are. No step makes a row worse.

Shapes: O output channel, I input channel, G group of input channels, X channel of a block.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from model.calibration.int4_weight import Int4Weight, better_rows
from model.numerics.int4_groups import MAX, MIN

SWEEPS = 2
# Columns whose effect on the others' gradients is applied at once.
_BLOCK = 128
# Added to the diagonal of the normal equations of a row's scales, in means of it.
_RIDGE = 1e-6


@torch.no_grad()
def descend(weight_OI: Tensor, moment_II: Tensor, start: Int4Weight, *, sweeps: int = SWEEPS) -> Int4Weight:
    """int4 weight whose outputs are at least as near as those of `start`, row by row.

    Args:
        moment_II: sum or mean of x x^T over the inputs.
        sweeps: passes over all values, each followed by a solution for the scales.
    """
    moment_II, found = moment_II.float(), start
    for _ in range(sweeps):
        found = better_rows(weight_OI, moment_II, _values(weight_OI, moment_II, found), found)
        found = better_rows(weight_OI, moment_II, _scales(weight_OI, moment_II, found), found)
    return found


def _values(weight_OI: Tensor, moment_II: Tensor, start: Int4Weight) -> Int4Weight:
    """One pass over the columns. The gradient of a value is (W - Q) H; a column never seen has none, and stays."""
    values_IO = start.values_OI.float().T.contiguous()
    scale_IO = start.scale_OG.float().T.repeat_interleave(start.group, dim=0)[: values_IO.shape[0]]
    gradient_IO = moment_II @ (weight_OI.float().T - values_IO * scale_IO)
    curvature_I = moment_II.diagonal()
    seen = (curvature_I > 0).tolist()
    for first in range(0, values_IO.shape[0], _BLOCK):
        block = slice(first, min(first + _BLOCK, values_IO.shape[0]))
        corner_XX, local_XO = moment_II[block, block], gradient_IO[block].clone()
        change_XO = torch.zeros_like(local_XO)
        for place in range(local_XO.shape[0]):
            column = first + place
            if not seen[column]:
                continue
            value_O, scale_O = values_IO[column], scale_IO[column]
            best_O = (value_O + local_XO[place] / (curvature_I[column] * scale_O)).round_().clamp_(MIN, MAX)
            change_XO[place] = (best_O - value_O) * scale_O
            values_IO[column] = best_O
            local_XO.addr_(corner_XX[place], change_XO[place], alpha=-1)
        gradient_IO.addmm_(moment_II[:, block], change_XO, alpha=-1)
    return start._replace(values_OI=values_IO.T.to(torch.int8).contiguous())


def _scales(weight_OI: Tensor, moment_II: Tensor, start: Int4Weight) -> Int4Weight:
    """Scales that solve A s = b of each row: A[g, h] = v_g H_gh v_h and b[h] = w H_h v_h, for its values v."""
    columns, group = moment_II.shape[0], start.group
    padding = (0, 0, 0, -columns % group)
    values_IO, weight_IO = start.values_OI.float().T.contiguous(), weight_OI.float().T
    matrices, sides = [], []
    for first in range(0, columns, group):
        block = slice(first, min(first + group, columns))
        through_IO = moment_II[:, block] @ values_IO[block]
        by_group_GXO = F.pad(values_IO * through_IO, padding).view(-1, group, values_IO.shape[1])
        matrices.append(by_group_GXO.sum(dim=1))
        sides.append((weight_IO * through_IO).sum(dim=0))
    matrix_OGG, side_OG = torch.stack(matrices, dim=2).transpose(0, 1).double(), torch.stack(sides, dim=1).double()
    diagonal_OG = matrix_OGG.diagonal(dim1=1, dim2=2)
    free_OG = diagonal_OG > 0
    ridge_OG = torch.where(free_OG, _RIDGE * diagonal_OG.mean(dim=1, keepdim=True), 1.0)
    solved_OG = torch.linalg.solve(matrix_OGG + torch.diag_embed(ridge_OG), side_OG).to(start.scale_OG.dtype)
    usable_OG = free_OG & (solved_OG > 0) & torch.isfinite(solved_OG)
    return start._replace(scale_OG=torch.where(usable_OG, solved_OG, start.scale_OG))
