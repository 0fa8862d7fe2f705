"""The optimizer step: its groups, the schedule at its corners, clipping, and the move towards balanced experts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from cherry.job_config import TrainConfig
from cherry.optim.build import build_optimizer, learning_rate, set_learning_rate
from cherry.optim.expert_bias import update_expert_bias
from cherry.optim.grad_norm import clip_coefficient, gradient_norm
from model.model_config import ModelConfig
from model.moe import MoE
from model.transformer import DeepseekV3

TINY: dict[str, Any] = {"preset": "tiny", "vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2}


def rates(**options: Any) -> list[float]:
    config = TrainConfig(**{"steps": 20, "warmup_steps": 4, "learning_rate": 1.0, **options})
    return [learning_rate(config, step) for step in range(config.steps + 1)]


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_warm_up_is_linear_and_never_zero(schedule: str) -> None:
    assert rates(schedule=schedule)[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]


def test_no_warm_up_starts_at_the_full_rate() -> None:
    assert rates(warmup_steps=0)[0] == 1.0


@pytest.mark.parametrize(("schedule", "middle"), [("cosine", 0.55), ("linear", 0.55), ("constant", 1.0)])
def test_the_rate_falls_from_the_full_one_to_its_minimum(schedule: str, middle: float) -> None:
    values = rates(schedule=schedule, min_learning_rate_ratio=0.1)
    assert values[12] == pytest.approx(middle)
    assert values[20] == pytest.approx(1.0 if schedule == "constant" else 0.1)
    assert values[4:] == sorted(values[4:], reverse=True)


def test_cosine_and_linear_differ_between_their_ends() -> None:
    cosine, linear = rates(schedule="cosine"), rates(schedule="linear")
    assert cosine[8] > linear[8]
    assert cosine[16] < linear[16]


def test_every_group_gets_the_rate() -> None:
    optimizer = build_optimizer(nn.Linear(3, 2), TrainConfig())
    set_learning_rate(optimizer, 0.125)
    assert [group["lr"] for group in optimizer.param_groups] == [0.125, 0.125]


def test_matrices_decay_and_norms_do_not() -> None:
    model = DeepseekV3(ModelConfig(**TINY))
    model.init_weights(0)
    config = TrainConfig(learning_rate=0.5, weight_decay=0.1)
    optimizer = build_optimizer(model, config)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        # With gradients of zero AdamW does nothing but p -= lr * decay * p.
        kept = 0.95 if parameter.dim() > 1 else 1.0
        torch.testing.assert_close(parameter.detach(), kept * before[name], msg=name)
    grouped = sum(len(group["params"]) for group in optimizer.param_groups)
    assert grouped == len(list(model.parameters()))


@pytest.mark.parametrize(("max_norm", "left"), [(1.0, 1.0), (100.0, 13.0)])
def test_the_norm_is_of_all_gradients_and_the_coefficient_brings_it_to_its_maximum(
    max_norm: float, left: float
) -> None:
    model = nn.Linear(2, 1)
    model.weight.grad, model.bias.grad = torch.tensor([[3.0, 4.0]]), torch.tensor([12.0])
    norm = gradient_norm(model)
    assert float(norm) == pytest.approx(13.0)
    assert float(norm * clip_coefficient(norm, max_norm)) == pytest.approx(left, rel=1e-5)
    assert model.bias.grad.tolist() == [12.0], "the optimizer scales, on its own pass"


def test_a_gradient_that_is_not_finite_shows_in_the_norm() -> None:
    model = nn.Linear(2, 1, bias=False)
    model.weight.grad = torch.tensor([[float("nan"), 1.0]])
    assert not gradient_norm(model).isfinite()


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
