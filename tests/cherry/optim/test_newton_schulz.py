"""Newton-Schulz against the singular value decomposition and against torch's own iteration."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from cherry.optim.newton_schulz import orthogonalize


@pytest.mark.parametrize("sides", [(24, 24), (16, 40), (40, 16), (1, 7)])
def test_the_quintic_is_applied_to_singular_values_and_leaves_singular_vectors(sides: tuple[int, int]) -> None:
    x_BMN = torch.randn(3, *sides, generator=torch.Generator().manual_seed(0))
    for matrix, found in zip(x_BMN, orthogonalize(x_BMN, 5), strict=True):
        left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
        values /= values.norm()
        for _ in range(5):
            values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
        torch.testing.assert_close(found.double(), left @ values.diag() @ right, rtol=1e-4, atol=1e-5)


def test_singular_values_come_near_one() -> None:
    x_BMN = torch.randn(3, 16, 40, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalize(x_BMN, 5))
    assert 0.65 < float(values.min()) < float(values.max()) < 1.25


def test_matrices_of_a_stack_do_not_mix_and_zeros_stay_zeros() -> None:
    x_BMN = torch.randn(4, 6, 9, generator=torch.Generator().manual_seed(0))
    x_BMN[2] = 0.0
    found = orthogonalize(x_BMN, 5)
    for matrix, alone in zip(found, x_BMN, strict=True):
        torch.testing.assert_close(matrix, orthogonalize(alone[None], 5)[0], rtol=1e-4, atol=1e-5)
    assert not found[2].any()


@pytest.mark.parametrize("sides", [(16, 40), (40, 16)])
def test_a_step_of_torch_s_muon_is_along_the_same_direction(sides: tuple[int, int]) -> None:
    """torch iterates in bf16, so the two agree to its precision."""
    parameter = nn.Parameter(torch.zeros(sides))
    gradient = torch.randn(sides, generator=torch.Generator().manual_seed(0))
    parameter.grad = gradient.clone()
    torch.optim.Muon([parameter], lr=1.0, weight_decay=0.0, adjust_lr_fn="match_rms_adamw").step()
    expected = -0.2 * 40**0.5 * orthogonalize(gradient[None], 5)[0]
    assert float((parameter.detach() - expected).norm() / expected.norm()) < 0.02
