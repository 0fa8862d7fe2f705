"""Selection bias of the experts: its move towards balance by the sign of the load's error."""

from __future__ import annotations

from typing import Any

import torch

from cherry.optim.expert_bias import update_expert_bias
from model.model_config import ModelConfig
from model.moe import MoE

TINY: dict[str, Any] = {"preset": "tiny", "vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2}


def layers(counts: list[list[float]], **options: Any) -> list[MoE]:
    made = [MoE(ModelConfig(**{**TINY, "n_routed_experts": 4, **options})) for _ in counts]
    for layer, row in zip(made, counts, strict=True):
        layer.tokens_per_expert_E.copy_(torch.tensor(row))
    return made


def test_the_bias_of_a_busy_expert_falls_and_of_an_idle_one_rises_by_the_rate() -> None:
    made = layers([[0.0, 10.0, 5.0, 5.0], [4.0, 4.0, 4.0, 4.0]])
    bias = made[0].e_score_correction_bias_E
    assert bias is not None
    bias.fill_(0.5)
    counts = update_expert_bias(made, 0.125)
    assert counts.tolist() == [[0.0, 10.0, 5.0, 5.0], [4.0, 4.0, 4.0, 4.0]]
    assert bias.tolist() == [0.625, 0.375, 0.5, 0.5]
    assert made[1].e_score_correction_bias_E is not None
    assert made[1].e_score_correction_bias_E.tolist() == [0.0] * 4
    assert all(not layer.tokens_per_expert_E.any() for layer in made)
    update_expert_bias(made, 0.125)  # nothing was counted since
    assert bias.tolist() == [0.625, 0.375, 0.5, 0.5]


def test_the_distance_from_balance_does_not_matter() -> None:
    near, far = layers([[99.0, 101.0, 100.0, 100.0], [0.0, 400.0, 0.0, 0.0]])
    update_expert_bias([near, far], 1.0)
    assert near.e_score_correction_bias_E is not None
    assert far.e_score_correction_bias_E is not None
    assert near.e_score_correction_bias_E.tolist() == [1.0, -1.0, 0.0, 0.0]
    assert far.e_score_correction_bias_E.tolist() == [1.0, -1.0, 1.0, 1.0]


def test_a_router_without_a_bias_is_counted_all_the_same() -> None:
    made = layers([[1.0, 2.0, 3.0, 4.0]], scoring_func="softmax", norm_topk_prob=False)
    assert update_expert_bias(made, 1.0).tolist() == [[1.0, 2.0, 3.0, 4.0]]
    assert not made[0].tokens_per_expert_E.any()
    assert update_expert_bias([], 1.0).shape == (0, 0)
