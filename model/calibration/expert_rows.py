"""Which tokens a routed expert is calibrated with: its own, and others where it saw few.

Experts are rounded one at a time: the tokens' hidden states stay in their file, and of each expert the rows that chose
it are gathered. So 256 experts need as much memory as one, and no passes over groups of them.

Shapes: N token of all documents, K top-k slot, R row of one expert, E expert, D hidden.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from model.calibration.feed_forward import Rows
from model.moe import MoE, Routing, route

ROWS_PER_CHANNEL = 4
"""Tokens for each input channel of an expert's widest projection, below which tokens of other experts are added.

Output error for an expert's unseen tokens, over that of rounding to the nearest, with its own tokens alone and with
others up to 4 a channel: down_proj of 96 channels from 8 tokens 0.82 and 0.51, from 96 tokens 0.64 and 0.50, from 512
alike; gate and up of 128 channels from 8 tokens 0.67 and 0.27, from 128 tokens 0.35 and 0.27 (second moments shrunk in
either case; a trained model of 4 layers and 8 experts, 2026-11-30).
"""


@dataclass(frozen=True)
class ExpertCoverage:
    """What one expert was calibrated with."""

    layer: int
    expert: int
    tokens: int
    """Calibration tokens that were routed to it."""
    borrowed: int
    """Tokens of other experts that were added, because its own were fewer than ROWS_PER_CHANNEL asks for."""


class ExpertRows(NamedTuple):
    """Tokens routed to an expert, and those that it is calibrated with."""

    own: Rows
    all: Rows


@torch.no_grad()
def routed(moe: MoE, x_ND: Tensor) -> Routing:
    """The router's choice for these rows, as in MoE.forward."""
    logits_NE = F.linear(x_ND.float(), moe.gate.weight.float())
    return route(logits_NE, moe.e_score_correction_bias_E, moe.config)


def rows_of(expert: int, experts_NK: Tensor, weight_NK: Tensor, least: int) -> ExpertRows:
    """Tokens of an expert, topped up to `least` with others, drawn evenly and the same each time.

    A borrowed token's weight is the mean of the expert's own, or of all routed tokens where it has none.
    """
    token_R, slot_R = (experts_NK == expert).nonzero(as_tuple=True)
    own = Rows(token_R, weight_NK[token_R, slot_R])
    missing = min(least, experts_NK.shape[0]) - token_R.shape[0]
    if missing <= 0:
        return ExpertRows(own, own)
    others = torch.ones(experts_NK.shape[0], dtype=torch.bool)
    others[token_R] = False
    other_R = others.nonzero()[:, 0]
    drawn_R = other_R[torch.randperm(other_R.shape[0], generator=torch.Generator().manual_seed(expert))[:missing]]
    mean = own.weight_R.mean() if token_R.shape[0] else weight_NK.mean()
    weight_R = torch.cat([own.weight_R, mean.expand(drawn_R.shape[0])])
    return ExpertRows(own, Rows(torch.cat([token_R, drawn_R]), weight_R))
