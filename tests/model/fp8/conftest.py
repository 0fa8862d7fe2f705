"""What tests of fp8 layers share: tokens' experts with given counts, tensors like activations, and relative errors."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

COUNTS = [[130, 0, 1, 128, 300, 0, 0, 81], [640, 0, 0, 0, 0, 0, 0, 0], [80] * 8]


def choose(counts: list[int], choices: int, device: str = "cpu") -> Tensor:
    """Experts of each token [N, K] with these counts, in random order."""
    flat = torch.cat([torch.full((count,), expert) for expert, count in enumerate(counts)])
    return flat[torch.randperm(len(flat), generator=torch.Generator().manual_seed(1))].view(-1, choices).to(device)


def activations(*shape: int, seed: int = 0, device: str = "cuda") -> Tensor:
    """bf16, whose rows and columns differ in size as activations do."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(*shape, generator=generator)
    for axis in range(len(shape)):
        sizes = torch.rand(shape[axis], generator=generator).mul_(4).exp_()
        values *= sizes.view([-1 if other == axis else 1 for other in range(len(shape))])
    return (values / values.std()).to(device, torch.bfloat16)


def relative_error(got: Tensor, wanted: Tensor) -> float:
    return float((got.float() - wanted.float()).norm() / wanted.float().norm())


@pytest.fixture(params=COUNTS)
def counts(request: pytest.FixtureRequest) -> list[int]:
    """Tokens of each expert: uneven, all of one expert, even."""
    found: list[int] = request.param
    return found


@pytest.fixture
def chosen() -> Callable[..., Tensor]:
    return choose


@pytest.fixture
def numbers() -> Callable[..., Tensor]:
    return activations


@pytest.fixture
def relative() -> Callable[[Tensor, Tensor], float]:
    return relative_error
