"""The optimizer that a configuration builds: its parameter groups and the learning-rate schedule at its corners."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from cherry.optim.build import build_optimizer, learning_rate, set_learning_rate
from cherry.train_config import TrainConfig
from model.model_config import ModelConfig
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
