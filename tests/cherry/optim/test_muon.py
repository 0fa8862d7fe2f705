"""Muon on one rank against a plain loop over whole matrices; which parameters it takes, its states and its options."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from base.config import validate
from base.errors import ConfigError
from cherry.job_config import JobConfig
from cherry.optim import muon
from cherry.optim.adamw import OwnGradients
from cherry.optim.build import build_optimizer, hidden_matrices
from cherry.optim.muon import Muon
from cherry.train_config import TrainConfig
from model.model_config import ModelConfig
from model.transformer import DeepseekV3

TINY: dict[str, Any] = {"preset": "tiny", "vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2}
RATE, DECAY, CLIP = 0.02, 0.1, 0.37


def model_of(seed: int = 0) -> DeepseekV3:
    model = DeepseekV3(ModelConfig(**TINY))
    model.init_weights(seed)
    return model


def gradients_of(model: nn.Module, step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {name: torch.randn(p.shape, generator=generator) for name, p in model.named_parameters()}


def is_adamw_s(name: str, value: Tensor) -> bool:
    """By names alone, as a person reads the documentation."""
    outside = ("embed_tokens.weight", "lm_head.weight", "eh_proj.weight", "mlp.gate.weight")
    return value.dim() == 1 or name.endswith(outside)


def reference_direction(matrix: Tensor, iterations: int) -> Tensor:
    """One whole matrix, in the words of Keller Jordan's post."""
    if matrix.shape[0] > matrix.shape[1]:
        return reference_direction(matrix.T, iterations).T
    x = matrix / (matrix.pow(2).sum().sqrt() + 1e-7)
    for _ in range(iterations):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x


def matrices_in(name: str, value: Tensor) -> list[Tensor]:
    """What the released checkpoint stores as one matrix each, as views."""
    found = []
    for matrix in value if value.dim() == 3 else [value]:
        fused = "gate_up_proj" in name or "w13" in name
        half = matrix.shape[0] // 2
        found += [matrix[:half], matrix[half:]] if fused else [matrix]
    return found


def reference_step(name: str, value: Tensor, gradient: Tensor, buffer: Tensor, *, nesterov: bool = True) -> None:
    """Muon's update of one parameter, in place: Moonlight's algorithm 1 with its equation 4."""
    for p, g, m in zip(*(matrices_in(name, tensor) for tensor in (value, gradient, buffer)), strict=True):
        m.mul_(0.95).add_(g)
        direction = reference_direction(g + 0.95 * m if nesterov else m.clone(), 5)
        p.sub_(RATE * (0.2 * max(p.shape) ** 0.5 * direction + DECAY * p))


@pytest.mark.parametrize("bucket_elements", [1, 1000, 1 << 25])
@pytest.mark.parametrize("nesterov", [True, False])
def test_three_steps_are_the_plain_loop_s(
    bucket_elements: int, nesterov: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(muon, "BUCKET_ELEMENTS", bucket_elements)
    model, twin = model_of(), model_of()
    config = TrainConfig(optimizer="muon", muon={"nesterov": nesterov}, learning_rate=RATE, weight_decay=DECAY)  # type: ignore[arg-type]
    optimizer = build_optimizer(model, config)
    expected = {name: parameter.detach() for name, parameter in twin.named_parameters()}
    buffers = {name: torch.zeros_like(value) for name, value in expected.items()}
    twin_adamw = torch.optim.AdamW(
        [
            {"params": [p], "weight_decay": DECAY if p.dim() > 1 else 0.0}
            for name, p in twin.named_parameters()
            if is_adamw_s(name, p)
        ],
        lr=RATE,
        betas=(0.9, 0.95),
    )
    for step in range(3):
        gradients = gradients_of(model, step)
        for (name, parameter), other in zip(model.named_parameters(), twin.parameters(), strict=True):
            parameter.grad, other.grad = gradients[name].clone(), CLIP * gradients[name]
        optimizer.ready_step(OwnGradients(), torch.tensor(CLIP))()
        twin_adamw.step()
        for name, value in expected.items():
            if not is_adamw_s(name, value):
                reference_step(name, value, CLIP * gradients[name], buffers[name], nesterov=nesterov)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach(), expected[name], rtol=1e-4, atol=2e-5, msg=name)


def test_one_momentum_a_matrix_and_two_moments_elsewhere() -> None:
    model = model_of()
    optimizer = build_optimizer(model, TrainConfig(optimizer="muon", optimizer_state_dtype="bf16"))
    assert isinstance(optimizer, Muon)
    for name, gradient in gradients_of(model, 0).items():
        model.get_parameter(name).grad = gradient
    optimizer.step()
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        state = optimizer.state[parameter]
        moments = {"step", "exp_avg", "exp_avg_sq"} if is_adamw_s(name, parameter) else {"momentum_buffer"}
        assert state.keys() == moments, name
        assert all(state[key].dtype == torch.bfloat16 for key in moments - {"step"})


def test_a_bf16_momentum_is_the_fp32_one_rounded() -> None:
    model = model_of()
    optimizer = build_optimizer(model, TrainConfig(optimizer="muon", optimizer_state_dtype="bf16"))
    assert isinstance(optimizer, Muon)
    name, expected = "layers.0.self_attn.o_proj.weight", torch.zeros(())
    for step in range(3):
        for key, gradient in gradients_of(model, step).items():
            model.get_parameter(key).grad = gradient
        expected = (0.95 * expected + gradients_of(model, step)[name]).bfloat16().float()
        optimizer.step()
    found = optimizer.state[model.get_parameter(name)]["momentum_buffer"].float()
    torch.testing.assert_close(found, expected, rtol=2**-7, atol=1e-6)


def test_an_update_has_the_root_mean_square_of_adamw_s() -> None:
    model = model_of()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = build_optimizer(model, TrainConfig(optimizer="muon", learning_rate=RATE, weight_decay=0.0))
    assert isinstance(optimizer, Muon)
    for name, gradient in gradients_of(model, 0).items():
        model.get_parameter(name).grad = gradient
    optimizer.step()
    for parameter in hidden_matrices(model):
        name = next(name for name, other in model.named_parameters() if other is parameter)
        rms = float((parameter.detach() - before[name]).square().mean().sqrt()) / RATE
        assert 0.12 < rms < 0.26, (
            name
        )  # Moonlight, section 2.2: between 0.2 and 0.4 in AdamW; singular values are 0.7 to 1.2


def test_a_rate_of_zero_changes_no_parameter_and_makes_the_states() -> None:
    """As torch's checkpoints do before they load."""
    model, before = model_of(), model_of()
    optimizer = build_optimizer(model, TrainConfig(optimizer="muon"))
    assert isinstance(optimizer, Muon)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for parameter, other in zip(model.parameters(), before.parameters(), strict=True):
        assert torch.equal(parameter, other)
        assert optimizer.state[parameter]


def job(**changes: Any) -> dict[str, Any]:
    train = {"optimizer": "muon", **changes.pop("train", {})}
    return {"name": "test", "model": {"preset": "tiny"}, "train": train, **changes}


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"lora": {}, "init_from": "weights"}, r"train\.optimizer: must be adamw with lora"),
        ({"parallel": {"cpu_offload": True}}, r"train\.optimizer: must be adamw with parallel\.cpu_offload"),
        (
            {"train": {"optimizer_state_dtype": "bf16", "muon": {"momentum": 0.99}}},
            r"train\.muon\.momentum: must be at most 0\.98 .*0\.99",
        ),
        ({"train": {"optimizer": "lion"}}, r"train\.optimizer.*'adamw' or 'muon'"),
    ],
)
def test_a_combination_that_cannot_work_is_refused(changes: dict[str, Any], rule: str) -> None:
    assert validate(job(), JobConfig, origin="test").train.optimizer == "muon"
    with pytest.raises(ConfigError, match=rule):
        validate(job(**changes), JobConfig, origin="test")
