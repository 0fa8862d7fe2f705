"""AdamW against torch's own, its clip, bf16 moments, and checkpoints from one type of moments to the other."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from base.config import validate
from base.errors import ConfigError
from cherry.checkpoint.checkpointer import Checkpointer, restore
from cherry.optim.adamw import AdamW, OwnGradients, Shards, step_reference
from cherry.train_config import TrainConfig


def parameters(seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(16, 9), (7,), (0, 5), (3, 4, 5)]
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def gradients(step: int) -> list[Tensor]:
    return [parameter.detach() for parameter in parameters(100 + step)]


def build(state_dtype: torch.dtype, seed: int = 0) -> tuple[list[nn.Parameter], AdamW]:
    made = parameters(seed)
    optimizer = AdamW(
        [{"params": made[:2], "weight_decay": 0.1}, {"params": made[2:]}],
        lr=1e-2,
        betas=(0.9, 0.95),
        state_dtype=state_dtype,
    )
    return made, optimizer


def take(made: list[nn.Parameter], optimizer: AdamW, step: int, coefficient: float | None) -> None:
    for parameter, gradient in zip(made, gradients(step), strict=True):
        parameter.grad = gradient.clone()
    optimizer.ready_step(OwnGradients(), None if coefficient is None else torch.tensor(coefficient))()


@pytest.mark.parametrize("coefficient", [None, 0.37])
def test_the_fused_step_and_the_plain_one_are_torch_s_on_clipped_gradients(coefficient: float | None) -> None:
    fused, optimizer = build(torch.float32)
    plain = [parameter.detach().clone() for parameter in fused]
    moments = [[torch.zeros_like(parameter) for parameter in plain] for _ in range(2)]
    steps = [torch.zeros(()) for _ in plain]
    expected = [nn.Parameter(parameter.clone()) for parameter in plain]
    groups = [{"params": expected[:2], "weight_decay": 0.1}, {"params": expected[2:], "weight_decay": 0.0}]
    torchs = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95))
    for step in range(10):
        take(fused, optimizer, step, coefficient)
        for part in (slice(0, 2), slice(2, None)):
            shards = Shards(
                plain[part],
                gradients(step)[part],
                moments[0][part],
                moments[1][part],
                steps[part],
                [None] * len(plain[part]),
            )
            scale = None if coefficient is None else torch.tensor(coefficient)
            step_reference(shards, optimizer.param_groups[0 if part.start == 0 else 1], scale)
        for parameter, gradient in zip(expected, gradients(step), strict=True):
            parameter.grad = gradient * (coefficient or 1.0)
        torchs.step()
    for ours, also, reference in zip(fused, plain, expected, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(also, reference.detach(), rtol=1e-6, atol=1e-6)


def test_bf16_moments_are_the_fp32_ones_rounded_after_each_step() -> None:
    made, optimizer = build(torch.bfloat16)
    means, squares = ([torch.zeros_like(p) for p in made] for _ in range(2))
    for step in range(5):
        take(made, optimizer, step, None)
        for mean, square, gradient in zip(means, squares, gradients(step), strict=True):
            mean.copy_((0.9 * mean + 0.1 * gradient).bfloat16())
            square.copy_((0.95 * square + 0.05 * gradient**2).bfloat16())
    for parameter, mean, square in zip(made, means, squares, strict=True):
        state = optimizer.state[parameter]
        assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == torch.bfloat16
        assert state["step"] == 5
        assert parameter.dtype == torch.float32
        # Rounding falls to the other side now and then, where the order of operations differs.
        torch.testing.assert_close(state["exp_avg"].float(), mean, rtol=2**-7, atol=1e-6)
        torch.testing.assert_close(state["exp_avg_sq"].float(), square, rtol=2**-7, atol=1e-6)


def test_a_rate_of_zero_changes_no_parameter() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        made, optimizer = build(dtype)
        for group in optimizer.param_groups:
            group["lr"] = 0.0
        take(made, optimizer, 0, None)
        for parameter, before in zip(made, parameters(), strict=True):
            assert torch.equal(parameter, before)


@pytest.mark.parametrize(("saved", "loaded"), [("bf16", "bf16"), ("bf16", "fp32"), ("fp32", "bf16"), ("fp32", "fp32")])
def test_a_checkpoint_goes_from_one_type_of_moments_to_the_other(
    tmp_path: Path, group: dist.ProcessGroup, saved: str, loaded: str
) -> None:
    types = {"bf16": torch.bfloat16, "fp32": torch.float32}

    def trained(dtype: torch.dtype, seed: int, steps: int) -> tuple[nn.Module, AdamW]:
        torch.manual_seed(seed)
        model = nn.Linear(6, 4)
        optimizer = AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.95), state_dtype=dtype)
        for _ in range(steps):
            model(torch.randn(3, 6)).square().sum().backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad()
        return model, optimizer

    model, optimizer = trained(types[saved], 0, 3)
    saver = Checkpointer(str(tmp_path), keep_last=1, asynchronous=False, group=group, fence=None)
    saver.save(3, model, optimizer, {"step": 3})
    saver.close()
    other, other_optimizer = trained(types[loaded], 1, 0)
    assert saver.last_saved is not None
    restore(saver.last_saved, other, other_optimizer, group)
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(ours, theirs)
        assert other_optimizer.state[theirs]["step"] == 3
        for key in ("exp_avg", "exp_avg_sq"):
            stored, found = optimizer.state[ours][key], other_optimizer.state[theirs][key]
            assert found.dtype == types[loaded]
            assert torch.equal(found, stored.to(types[loaded]))


def test_a_decay_that_bf16_cannot_hold_is_refused() -> None:
    TrainConfig(beta2=0.999)
    TrainConfig(beta2=0.98, optimizer_state_dtype="bf16")
    with pytest.raises(ConfigError, match=r"beta2: must be at most 0\.98 with train\.optimizer_state_dtype"):
        validate({"beta2": 0.999, "optimizer_state_dtype": "bf16"}, TrainConfig, origin="test")
