"""Routed experts rounded one at a time, each for the tokens that were routed to it.

One expert's weights and second moments are in memory at a time, however many there are: the tokens' hidden states stay
in their file, and of each expert the rows that chose it are gathered. So 256 experts need as much memory as one:
2 x 7168^2 + 2048^2 fp32 numbers for moments and their factors beside 44 M weights, in passes over no one's groups.

Shapes: N token of all documents, K top-k slot, R row of one expert, D hidden, F intermediate width, X = 2 F,
E expert.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from model.calibration.awq import ScalingSearch, fold_up
from model.calibration.int4_weight import Int4Weight
from model.calibration.method import Method
from model.calibration.second_moment import SecondMoment
from model.moe import MoE, Routing, route

_CHUNK_ROWS = 8192


@dataclass(frozen=True)
class ExpertCoverage:
    """What one expert was calibrated with."""

    layer: int
    expert: int
    tokens: int
    """Calibration tokens that were routed to it."""
    borrowed: int
    """Tokens of other experts that were taken as well, because its own were fewer than `Method.min_expert_rows`."""


class Expert(NamedTuple):
    """Weights of one routed expert, and what is rounded of them."""

    gate_up_XD: Tensor
    down_DF: Tensor
    round_gate_up: bool
    round_down: bool


class Rows(NamedTuple):
    """Tokens of one expert and the weights of its output; `own` of them are routed to it, the rest are borrowed."""

    token_R: Tensor
    weight_R: Tensor
    own: int


Inputs = Callable[[Tensor], Tensor]
"""Token indices [R] -> their rows [R, D] as the experts get them."""


@torch.no_grad()
def routed(moe: MoE, x_ND: Tensor) -> Routing:
    """The router's choice for these rows, as in MoE.forward."""
    logits_NE = F.linear(x_ND.float(), moe.gate.weight.float())
    return route(logits_NE, moe.e_score_correction_bias_E, moe.config)


def rows_of(expert: int, experts_NK: Tensor, weight_NK: Tensor, least: int) -> Rows:
    """Tokens of an expert, topped up to `least` with others, drawn evenly and the same each time.

    A borrowed token's weight is the mean of the expert's own, or of all routed tokens where it has none.
    """
    token_R, slot_R = (experts_NK == expert).nonzero(as_tuple=True)
    weight_R = weight_NK[token_R, slot_R]
    missing = min(least, experts_NK.shape[0]) - token_R.shape[0]
    if missing <= 0:
        return Rows(token_R, weight_R, token_R.shape[0])
    others = torch.ones(experts_NK.shape[0], dtype=torch.bool)
    others[token_R] = False
    other_R = others.nonzero()[:, 0]
    drawn = torch.randperm(other_R.shape[0], generator=torch.Generator().manual_seed(expert))[:missing]
    mean = weight_R.mean() if token_R.shape[0] else weight_NK.mean()
    tokens = torch.cat([token_R, other_R[drawn]])
    return Rows(tokens, torch.cat([weight_R, mean.expand(drawn.shape[0])]), token_R.shape[0])


class ExpertRounding(NamedTuple):
    """One expert rounded: weights as rounded, and the values of what was."""

    gate_up_XD: Tensor
    down_DF: Tensor
    gate_up: Int4Weight | None
    down: Int4Weight | None


@torch.no_grad()
def round_expert(expert: Expert, rows: Rows, inputs: Inputs, method: Method) -> ExpertRounding:
    """Round gate and up, then down for the inputs that it gets from those."""
    gate_up_XD, down_DF = expert.gate_up_XD.clone(), expert.down_DF.clone()
    if method.awq and expert.round_down:
        moment = _down_moment(gate_up_XD, rows, inputs)
        search = ScalingSearch(moment.mean(), method.group, method.scale_dtype)
        search.add(down_DF, moment.sum_II)
        fold_up(gate_up_XD, down_DF, search.best())
    gate_up = down = None
    if expert.round_gate_up:
        gate_up = method.round(gate_up_XD, gate_up_moment(rows, inputs) if method.needs_inputs else None)
        gate_up_XD = gate_up.dequantized().to(gate_up_XD.dtype)
    if expert.round_down:
        down = method.round(down_DF, _down_moment(gate_up_XD, rows, inputs) if method.needs_inputs else None)
        down_DF = down.dequantized().to(down_DF.dtype)
    return ExpertRounding(gate_up_XD, down_DF, gate_up, down)


def gate_up_moment(rows: Rows, inputs: Inputs) -> SecondMoment:
    """Second moment of the inputs of gate and up."""
    return _moment(inputs(chunk.token_R) for chunk in chunks(rows))


def _down_moment(gate_up_XD: Tensor, rows: Rows, inputs: Inputs) -> SecondMoment:
    """Second moment of down's inputs, with the routing weight in them, as in Experts."""
    return _moment(activation(inputs(chunk.token_R), gate_up_XD, chunk.weight_R) for chunk in chunks(rows))


def _moment(parts: Iterator[Tensor]) -> SecondMoment:
    first = next(parts)
    moment = SecondMoment(first.shape[1], first.device)
    moment.add(first)
    for part in parts:
        moment.add(part)
    return moment


def chunks(rows: Rows, *, own: bool = False) -> Iterator[Rows]:
    """Rows in pieces that fit into memory, at least one; only the expert's own on request."""
    total = rows.own if own else rows.token_R.shape[0]
    for first in range(0, max(total, 1), _CHUNK_ROWS):
        part = slice(first, min(first + _CHUNK_ROWS, total))
        yield Rows(rows.token_R[part], rows.weight_R[part], max(0, min(rows.own, part.stop) - first))


def activation(x_RD: Tensor, gate_up_XD: Tensor, weight_R: Tensor) -> Tensor:
    """silu(gate) * up * routing weight [R, F]."""
    gate_RF, up_RF = F.linear(x_RD, gate_up_XD).chunk(2, dim=-1)
    return F.silu(gate_RF) * up_RF * weight_R.to(x_RD.device, x_RD.dtype)[:, None]
