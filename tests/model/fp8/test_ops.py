"""Operators of fp8 layers as torch.compile sees them: results of the shapes and types that were promised."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from model.experts import permutation_by_expert
from model.fp8 import ops, reference
from model.fp8.linear import pad_rows

Chosen = Callable[..., Tensor]
Numbers = Callable[..., Tensor]


def check(operator: Callable[..., tuple[Tensor, ...]], *arguments: Any) -> tuple[Tensor, ...]:
    """Results of an operator, which must have the shapes and types that it promises a compiler."""
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(value) if isinstance(value, Tensor) else value for value in arguments]
        promised = operator(*fake)
    results = operator(*arguments)
    for promise, result in zip(promised, results, strict=True):
        assert (promise.shape, promise.dtype) == (result.shape, result.dtype)
        assert promise.is_contiguous() == result.is_contiguous()
    return results


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize(("rows", "width", "columns"), [(300, 256, 384), (1, 144, 128)])
def test_linear_operators(rows: int, width: int, columns: int, trained: bool, numbers: Numbers) -> None:
    x, weight = numbers(rows, width, device="cpu"), numbers(1, columns, width, seed=1, device="cpu")
    for transposed in (False, True):
        check(ops.cast_weight, weight, transposed)
    forward = x, *ops.cast_weight(weight, False)
    _, *x_transposed = check(ops.linear_forward, *forward)
    grad = numbers(rows, columns, seed=2, device="cpu")
    backward = grad, *ops.cast_weight(weight, True), *x_transposed, trained
    check(ops.linear_backward, *backward)


@pytest.mark.parametrize("trained", [False, True])
def test_expert_operators(trained: bool, counts: list[int], chosen: Chosen, numbers: Numbers) -> None:
    experts_NK = chosen(counts, 4)
    rows = pad_rows(permutation_by_expert(experts_NK, torch.tensor(counts)))
    x, grad = (numbers(len(experts_NK), 256, seed=seed, device="cpu") for seed in (0, 3))
    weights = numbers(8, 256, 256, seed=1, device="cpu"), numbers(8, 256, 128, seed=2, device="cpu")
    plain, transposed = ([part for w in weights for part in ops.cast_weight(w, wanted)] for wanted in (False, True))
    weight = torch.rand(len(rows.token_P)).where(rows.token_P >= 0, 0)
    forward = x, weight, *rows[:3], *plain
    _, *x_transposed, h = check(ops.experts_forward, *forward)
    backward = grad, weight, *rows, *transposed, *x_transposed, h, trained
    check(ops.experts_backward, *backward)


def test_both_layouts_of_a_weight_are_written_into_given_tensors(numbers: Numbers) -> None:
    weight = numbers(2, 200, 300, device="cpu")
    wanted = [*reference.cast_weight(weight, False), *reference.cast_weight(weight, True)]
    made = [torch.empty_like(tensor) for tensor in wanted]
    ops.cast_both_(weight, *made)
    assert all(torch.equal(got.float(), expected.float()) for got, expected in zip(made, wanted, strict=True))
