"""Mixture of experts: the router (top-k with noaux_tc bias), expert counts, balance loss, and the MoE layer.

The trainer reads the counts, updates the router bias and clears them.
Sources: DeepSeek-V3 (arXiv 2412.19437, section 2.1.2) and DeepSeek-V2 (arXiv 2405.04434, section 2.2).

Shapes: B batch, T position, N = B T tokens, D hidden, E expert, K top-k slot, G group.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.experts import Experts
from model.layers import Fp32Buffers, SwiGLU
from model.model_config import ModelConfig

# Added to the sum of the chosen scores before dividing, as in the released code.
_NORM_EPS = 1e-20


class Routing(NamedTuple):
    """Router output, all fp32 but the indices."""

    experts_NK: Tensor
    weight_NK: Tensor
    """Routing weights, which the chosen experts' outputs are multiplied with; differentiable."""
    score_NE: Tensor
    """Unbiased scores; differentiable."""


class MoEOutput(NamedTuple):
    """Output of one MoE layer."""

    hidden_BTD: Tensor
    balance_loss: Tensor
    """0-dim fp32, unweighted; zero outside training."""
    counts_E: Tensor
    """Tokens that chose each expert, fp32."""


def route(logits_NE: Tensor, bias_E: Tensor | None, config: ModelConfig) -> Routing:
    """Top-k experts of each token [N, K], their routing weights and all scores, from fp32 logits.

    sigmoid (V3, noaux_tc): the bias affects the selection only, never the weights or the gradient; a
    group's score is the sum of its top 2. softmax (V2): no bias, a group's score is its maximum.
    """
    score_NE = logits_NE.sigmoid() if config.scoring_func == "sigmoid" else logits_NE.softmax(dim=-1)
    with torch.no_grad():
        choice_NE = score_NE.detach() if bias_E is None else score_NE.detach() + bias_E
        if config.topk_group < config.n_group:
            choice_NE = _mask_groups(choice_NE, config)
        experts_NK = choice_NE.topk(config.num_experts_per_tok, dim=-1, sorted=False).indices
    weight_NK = score_NE.gather(1, experts_NK)
    # V2 divides only where the configuration asks for it, V3's release always does.
    if config.norm_topk_prob:
        weight_NK = weight_NK / (weight_NK.sum(dim=-1, keepdim=True) + _NORM_EPS)
    return Routing(experts_NK, weight_NK * config.routed_scaling_factor, score_NE)


def _mask_groups(choice_NE: Tensor, config: ModelConfig) -> Tensor:
    """Scores [N, E] with -inf (not 0: biased scores can be negative) outside the topk_group best groups."""
    choice_NGX = choice_NE.view(choice_NE.shape[0], config.n_group, -1)
    best = 2 if config.scoring_func == "sigmoid" else 1
    group_NG = choice_NGX.topk(best, dim=-1, sorted=False).values.sum(-1)
    kept_NG = group_NG.topk(config.topk_group, dim=-1, sorted=False).indices
    dropped_NG = torch.ones_like(group_NG, dtype=torch.bool).scatter_(1, kept_NG, value=False)
    return choice_NGX.masked_fill(dropped_NG[:, :, None], float("-inf")).flatten(1)


def sequence_balance_loss(
    score_BTE: Tensor, chosen_BE: Tensor, experts_per_token: int, whole_length: int | None = None
) -> Tensor:
    """Mean over sequences of sum_i f_i P_i (V3, equations 17 to 20), unweighted, 0-dim.

    f_i = E / (K T) * tokens of the sequence that chose i; P_i = mean over the sequence of the score's share.

    Args:
        chosen_BE: counts over the whole sequences.
        whole_length: T of the whole sequence under context parallelism; the ranks' losses add up to the sequence's.
    """
    experts, length = score_BTE.shape[-1], whole_length or score_BTE.shape[1]
    share_BE = (score_BTE / score_BTE.sum(dim=-1, keepdim=True)).sum(dim=1) / length
    fraction_BE = chosen_BE * (experts / (experts_per_token * length))
    return (fraction_BE * share_BE).sum(dim=-1).mean()


ReduceCounts = Callable[[Tensor, int], tuple[Tensor, int]]
"""Counts [B, E] over this rank's positions of each sequence, and their number -> both over all positions."""


class MoE(Fp32Buffers):
    """MoE layer: routed experts plus shared experts, dropless."""

    e_score_correction_bias_E: Tensor | None
    tokens_per_expert_E: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.reduce_counts: ReduceCounts | None = None
        """Set under context parallelism: this rank has only some positions of each sequence."""
        experts, width = config.n_routed_experts, config.hidden_size
        self.gate = nn.Linear(width, experts, bias=False)
        self.experts = Experts(experts, width, config.moe_intermediate_size)
        shared = config.n_shared_experts * config.moe_intermediate_size
        self.shared_experts = SwiGLU(width, shared) if shared else None
        bias = torch.zeros(experts, dtype=torch.float32) if config.scoring_func == "sigmoid" else None
        self.register_buffer("e_score_correction_bias_E", bias)
        counts = torch.zeros(experts, dtype=torch.float32)
        self.register_buffer("tokens_per_expert_E", counts, persistent=False)

    def forward(self, x_BTD: Tensor) -> MoEOutput:
        """Output of routed and shared experts [B, T, D], with balance loss and expert counts.

        The counts are returned, not stored: activation recompute runs this twice, and only the caller outside of
        it knows which run counts.
        """
        batch, length, width = x_BTD.shape
        x_ND = x_BTD.reshape(-1, width)
        sent = self.experts.send(x_ND)
        with torch.autocast(x_ND.device.type, enabled=False):
            logits_NE = F.linear(x_ND.float(), self.gate.weight.float())
        routing = route(logits_NE, self.e_score_correction_bias_E, self.config)
        chosen_NE = torch.zeros_like(routing.score_NE, requires_grad=False)
        chosen_NE = chosen_NE.scatter_(1, routing.experts_NK, 1.0)
        chosen_BE = chosen_NE.view(batch, length, -1).sum(dim=1)
        counts_E = chosen_BE.sum(dim=0)
        out = self.experts(sent, routing.weight_NK, routing.experts_NK, counts_E.to(torch.int64))
        shared_ND = None if self.shared_experts is None else self.shared_experts(x_ND)
        out_ND = self.experts.receive(out)
        if shared_ND is not None:
            out_ND = out_ND + shared_ND
        balance_loss = counts_E.new_zeros(())
        if self.training:
            score_BTE = routing.score_NE.view(batch, length, -1)
            if self.reduce_counts is not None:
                chosen_BE, length = self.reduce_counts(chosen_BE, length)
            balance_loss = sequence_balance_loss(score_BTE, chosen_BE, self.config.num_experts_per_tok, length)
        return MoEOutput(out_ND.view_as(x_BTD), balance_loss, counts_E)
