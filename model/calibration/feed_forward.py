"""A feed-forward rounded: gate and up, then down for the inputs that it gets from those. One expert, or a dense layer.

Shapes: N token of all documents, R row (one of its tokens), O output channel, D hidden, F intermediate width, X = 2 F.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from model.calibration.awq import ScalingSearch, fold_up
from model.calibration.int4_weight import Int4Weight
from model.calibration.method import Method
from model.calibration.second_moment import SecondMoment

_CHUNK_ROWS = 8192


class FeedForward(NamedTuple):
    """Plain weights, and which of them are rounded."""

    gate_up_XD: Tensor
    down_DF: Tensor
    round_gate_up: bool
    round_down: bool


class Rows(NamedTuple):
    """Tokens that a feed-forward is calibrated with, and the weights of its output."""

    token_R: Tensor
    weight_R: Tensor


Inputs = Callable[[Tensor], Tensor]
"""Token indices [R] -> their rows [R, D] as the feed-forward gets them."""


class Rounded(NamedTuple):
    """Weights as they compute from now on, and the values of what was rounded."""

    gate_up_XD: Tensor
    down_DF: Tensor
    gate_up: Int4Weight | None
    down: Int4Weight | None
    scaling_F: Tensor | None
    """What AWQ multiplied down's columns by, and divided up's rows by; `None` where it did not."""


@torch.no_grad()
def round_feed_forward(plain: FeedForward, rows: Rows, inputs: Inputs, method: Method) -> Rounded:
    """Round what is to be rounded; with AWQ, up's rows and down's columns are scaled first."""
    exact_XD, down_DF, scaling_F = plain.gate_up_XD.clone(), plain.down_DF.clone(), None
    if method.awq and plain.round_down:
        moment = _moment(activation(inputs(chunk.token_R), exact_XD, chunk.weight_R) for chunk in chunks(rows))
        search = ScalingSearch(moment.mean(), method.group, method.scale_dtype)
        search.add(down_DF, moment.sum_II)
        scaling_F = search.best()
        fold_up(exact_XD, down_DF, scaling_F)
    gate_up_XD, gate_up, down = exact_XD, None, None
    if plain.round_gate_up:
        gate_up = method.round(exact_XD, gate_up_moment(rows, inputs) if method.needs_inputs else None)
        gate_up_XD = gate_up.dequantized().to(exact_XD.dtype)
    if plain.round_down:
        drift = None
        if method.needs_inputs:
            drift = Drift(down_DF.shape[1], down_DF.device)
            for chunk in chunks(rows):
                x_RD = inputs(chunk.token_R)
                exact_RF, rounded_RF = (activation(x_RD, w_XD, chunk.weight_R) for w_XD in (exact_XD, gate_up_XD))
                drift.add(exact_RF, rounded_RF)
        target_DF = drift.corrected(down_DF, method.dampening) if drift is not None and method.corrects else down_DF
        down = method.round(target_DF, None if drift is None else drift.moment)
        down_DF = down.dequantized().to(down_DF.dtype)
    return Rounded(gate_up_XD, down_DF, gate_up, down, scaling_F)


class Drift:
    """Inputs of a layer behind rounded ones, and how far they are from what they were: sum of (exact - x) x^T."""

    def __init__(self, width: int, device: torch.device) -> None:
        self.moment = SecondMoment(width, device)
        self._sum_FF = torch.zeros_like(self.moment.sum_II)

    def add(self, exact_RF: Tensor, rounded_RF: Tensor) -> None:
        """Add the same rows as they were and as they are now."""
        self.moment.add(rounded_RF)
        self._sum_FF.addmm_((exact_RF.float() - rounded_RF.float()).T, rounded_RF.float())

    def corrected(self, weight_OF: Tensor, dampening: float) -> Tensor:
        """fp32 weight whose outputs of the inputs as they are now come closest to the old outputs [O, F].

        The aim of asymmetric calibration (GPTAQ, arXiv 2504.02692), here by regression: W + W D H^-1, with the shrunk
        and dampened H, and D shrunk alike. In a dense layer it took the error of the output of unseen rows, over that
        of rounding to the nearest, from 0.47 to 0.39 (a trained model of 4 layers, 2026-11-30).
        """
        moment_FF = self.moment.shrunk().double()
        scale = moment_FF.diagonal().mean().item()
        moment_FF.diagonal().add_(dampening * scale if scale else 1.0)
        drift_FF = self._sum_FF.double() * ((1 - self.moment.shrinkage()) / max(self.moment.rows, 1))
        change_FO = torch.linalg.solve(moment_FF, (weight_OF.double() @ drift_FF).T)
        corrected_OF: Tensor = weight_OF.float() + change_FO.T.float()
        return corrected_OF


def gate_up_moment(rows: Rows, inputs: Inputs) -> SecondMoment:
    """Second moment of the inputs of gate and up."""
    return _moment(inputs(chunk.token_R) for chunk in chunks(rows))


def _moment(parts: Iterator[Tensor]) -> SecondMoment:
    first = next(parts)
    moment = SecondMoment(first.shape[1], first.device)
    moment.add(first)
    for part in parts:
        moment.add(part)
    return moment


def chunks(rows: Rows) -> Iterator[Rows]:
    """Rows in pieces that fit into memory, at least one."""
    total = rows.token_R.shape[0]
    for first in range(0, max(total, 1), _CHUNK_ROWS):
        part = slice(first, min(first + _CHUNK_ROWS, total))
        yield Rows(rows.token_R[part], rows.weight_R[part])


def activation(x_RD: Tensor, gate_up_XD: Tensor, weight_R: Tensor) -> Tensor:
    """silu(gate) * up * weight [R, F]: inputs of down, with the routing weight in them, as in Experts."""
    gate_RF, up_RF = F.linear(x_RD, gate_up_XD).chunk(2, dim=-1)
    return F.silu(gate_RF) * up_RF * weight_R.to(x_RD.device, x_RD.dtype)[:, None]
