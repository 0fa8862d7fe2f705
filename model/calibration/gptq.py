"""GPTQ (Frantar et al. 2022, arXiv 2210.17323, algorithm 1): columns rounded in turn, the rest adjusted for each error.

Differences from the paper's code: the factor of the inverse comes from one Cholesky decomposition in fp64 and one
triangular inverse, instead of an inverse that is decomposed again; a group's scale may be searched by trial, rounding
the whole group under each candidate; and a row that comes out worse than without adjustment keeps what is better.

Shapes: O output channel, I input channel (in the order of rounding), G group, X channel of a block, C candidate scale.
"""

from __future__ import annotations

import torch
from torch import Tensor

from model.calibration.int4_weight import Int4Weight, better_rows, nearest, with_scale
from model.calibration.scale_search import ratios, search_scale
from model.numerics.int4_groups import MAX, MIN, largest_scale

# Section 3.3: share of the mean diagonal that is added to it, and columns whose effect on the rest is applied at once.
DAMPENING, _BLOCK = 0.01, 128
# Trials of a group are made for as many rows at a time as fit into this.
_TRIAL_BYTES = 64 << 20


@torch.no_grad()
def gptq(
    weight_OI: Tensor,
    moment_II: Tensor,
    group: int,
    scale_dtype: torch.dtype,
    *,
    search: bool = True,
    ordered: bool = False,
    dampening: float = DAMPENING,
) -> Int4Weight:
    """int4 weight that keeps the outputs of inputs with this second moment; no row is worse than without GPTQ.

    An input channel that was never seen is rounded to the nearest and adjusts nothing.

    Args:
        moment_II: sum or mean of x x^T over the inputs.
        search: search each group's scale, else the one that covers its largest magnitude.
        ordered: round channels with large inputs first (the code's `act_order`). The groups stay those of neighbouring
            channels, so their scales are fixed beforehand (`static_groups`).
        dampening: added to H's diagonal, in means of it.
    """
    moment_II = moment_II.float()
    baseline = _unadjusted(weight_OI, moment_II, group, scale_dtype, search=search)
    order_I = torch.arange(moment_II.shape[0], device=moment_II.device)
    if ordered:
        order_I = moment_II.diagonal().argsort(descending=True, stable=True)
    factor_II = inverse_factor(moment_II[order_I][:, order_I], dampening)
    work_IO = weight_OI.float().T[order_I].contiguous()
    fixed_IO = baseline.scale_OG.float().T[order_I // group] if ordered else None
    values_IO = torch.empty(work_IO.shape, dtype=torch.int8, device=work_IO.device)
    scales = []
    size = _BLOCK if ordered else group
    for first in range(0, work_IO.shape[0], size):
        block = slice(first, min(first + size, work_IO.shape[0]))
        corner_XX = factor_II[block, block]
        if fixed_IO is not None:
            scale_XO = fixed_IO[block]
        else:
            scale_O = _group_scale(work_IO[block], corner_XX, scale_dtype, search=search)
            scales.append(scale_O)
            scale_XO = scale_O.float().expand(corner_XX.shape[0], -1)
        values_IO[block], error_XO = _round_block(work_IO[block].clone(), corner_XX, scale_XO)
        work_IO[block.stop :].addmm_(factor_II[block, block.stop :].T, error_XO, alpha=-1)
    values_OI = values_IO[order_I.argsort()].T.contiguous()
    adjusted = Int4Weight(values_OI, baseline.scale_OG if ordered else torch.stack(scales, dim=1), group)
    return better_rows(weight_OI, moment_II, adjusted, baseline)


def inverse_factor(moment_II: Tensor, dampening: float) -> Tensor:
    """Upper triangular U, fp32, with U^T U the inverse of the dampened moment.

    With J reversing the order, J H J = L L^T makes J L J upper triangular and H = (J L J)(J L J)^T, so U is the inverse
    of J L J. Dampening grows tenfold until the decomposition exists: sums in fp32 may leave H slightly indefinite.
    """
    work_II = moment_II.double()
    scale = work_II.diagonal().mean().item() or 1.0
    eye_II = torch.eye(work_II.shape[0], dtype=torch.float64, device=work_II.device)
    while True:
        lower_II, failed = torch.linalg.cholesky_ex((work_II + eye_II * (dampening * scale)).flip(0, 1))
        if not failed.item():
            break
        dampening = max(dampening, 1e-4) * 10
    factor_II: Tensor = torch.linalg.solve_triangular(lower_II.flip(0, 1), eye_II, upper=True).float()
    return factor_II


def _unadjusted(
    weight_OI: Tensor, moment_II: Tensor, group: int, scale_dtype: torch.dtype, *, search: bool
) -> Int4Weight:
    plain = nearest(weight_OI, group, scale_dtype)
    if not search:
        return plain
    searched = with_scale(weight_OI, search_scale(weight_OI, group, moment_II, scale_dtype), group)
    return better_rows(weight_OI, moment_II, searched, plain)


def _group_scale(work_XO: Tensor, corner_XX: Tensor, scale_dtype: torch.dtype, *, search: bool) -> Tensor:
    """Scale of each row's group [O]: its largest magnitude over 7.5, or the candidate that GPTQ's own error is least
    under, with this group's later columns adjusted for its earlier ones.
    """
    base_O = largest_scale(work_XO.T, work_XO.shape[0])[:, 0]
    if not search:
        return base_O.to(scale_dtype)
    ratio_C1 = torch.tensor(ratios(), device=work_XO.device)[:, None]
    width = max(1, _TRIAL_BYTES // (4 * work_XO.shape[0] * ratio_C1.shape[0]))
    found = []
    for part_XO, part_O in zip(torch.split(work_XO, width, dim=1), torch.split(base_O, width), strict=True):
        scale_CO = (part_O * ratio_C1).to(scale_dtype)
        trial = part_XO.repeat(1, len(ratio_C1))
        _, error = _round_block(trial, corner_XX, scale_CO.flatten().float().expand(trial.shape[0], -1))
        best_1O = error.square_().sum(dim=0).view_as(scale_CO).argmin(dim=0, keepdim=True)
        found.append(scale_CO.gather(0, best_1O)[0])
    return torch.cat(found)


def _round_block(work_XO: Tensor, corner_XX: Tensor, scale_XO: Tensor) -> tuple[Tensor, Tensor]:
    """int8 values and errors [X, O] of a block's columns, rounded in turn; `work_XO` is overwritten.

    An error is in units of the output: its square is what the column adds to the squared error of its row's output.
    """
    values_XO = torch.empty(work_XO.shape, dtype=torch.int8, device=work_XO.device)
    error_XO = torch.empty_like(work_XO)
    for place in range(work_XO.shape[0]):
        column_O, scale_O = work_XO[place], scale_XO[place]
        rounded_O = (column_O / scale_O).round_().clamp_(MIN, MAX)
        values_XO[place] = rounded_O.to(torch.int8)
        error_XO[place] = (column_O - rounded_O * scale_O) / corner_XX[place, place]
        work_XO[place + 1 :].addr_(corner_XX[place, place + 1 :], error_XO[place], alpha=-1)
    return values_XO, error_XO
