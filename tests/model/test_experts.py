"""The grouped path of the experts against the loop over experts in fp32, on each device that there is."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from model.experts import can_group, grouped_experts, looped_experts, permutation_by_expert, run_permuted

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU and finds none")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, needs_gpu])]
WIDTH, INTERMEDIATE = 256, 96


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("counts", [[64] * 8, [0, 200, 1, 7, 0, 300, 4, 0], [512, 0, 0, 0, 0, 0, 0, 0]])
def test_grouped_experts_equal_the_loop(counts: list[int], device: str) -> None:
    generator = torch.Generator().manual_seed(0)

    def leaf(*shape: int) -> Tensor:
        values = torch.randn(*shape, generator=generator) / shape[-1] ** 0.5
        leaves: Tensor = values.to(device, torch.bfloat16).requires_grad_()
        return leaves

    inputs = [leaf(sum(counts), WIDTH), leaf(8, 2 * INTERMEDIATE, WIDTH), leaf(8, WIDTH, INTERMEDIATE)]
    weight = torch.rand(sum(counts), generator=generator).to(device).requires_grad_()
    counts_E = torch.tensor(counts, device=device)
    upstream = torch.randn(sum(counts), WIDTH, generator=generator).to(device)
    assert can_group(*inputs) == (device == "cuda")
    results = []
    for run, dtype in [
        (grouped_experts, torch.bfloat16),
        (looped_experts, torch.bfloat16),
        (looped_experts, torch.float32),
    ]:
        rows, w13, w2 = (tensor.to(dtype) for tensor in inputs)
        out = run(rows, weight, counts_E, w13, w2)
        results.append([out, *torch.autograd.grad((out.float() * upstream).sum(), [*inputs, weight])])
    for grouped, looped, exact in zip(*results, strict=True):
        allowed = 2 * (looped.float() - exact.float()).norm() + 1e-6
        assert (grouped.float() - exact.float()).norm() <= allowed, "the grouped path is as exact as the loop"
        assert grouped.isfinite().all()


def test_grouped_experts_in_fp32_have_the_gradients_of_finite_differences() -> None:
    torch.manual_seed(0)
    rows = torch.randn(6, 4, dtype=torch.float64)
    weight = torch.rand(6, dtype=torch.float64)
    w13, w2 = torch.randn(3, 8, 4, dtype=torch.float64), torch.randn(3, 4, 4, dtype=torch.float64)
    counts_E = torch.tensor([4, 0, 2])
    singles = [tensor.float().requires_grad_() for tensor in (rows, weight, w13, w2)]
    upstream = torch.randn(6, 4)
    out = grouped_experts(singles[0], singles[1], counts_E, singles[2], singles[3])
    gradients = torch.autograd.grad((out * upstream).sum(), singles)
    for place, (value, gradient) in enumerate(zip((rows, weight, w13, w2), gradients, strict=True)):
        direction = torch.randn_like(value)
        sides = []
        for sign in (1, -1):
            moved = [rows, weight, w13, w2]
            moved[place] = value + sign * 1e-5 * direction
            result = looped_experts(moved[0], moved[1], counts_E, moved[2], moved[3])
            sides.append((result * upstream).sum())
        slope = (sides[0] - sides[1]) / 2e-5
        assert (gradient.double() * direction).sum().item() == pytest.approx(slope.item(), rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("device", DEVICES)
def test_outputs_of_subsets_of_experts_add_up_to_those_of_all(device: str) -> None:
    """A slot routed off-rank adds nothing and gets a gradient of zero; a token may have no slot at all."""
    torch.manual_seed(0)
    tokens, choices, experts, each = 40, 3, 12, 4
    experts_NK = torch.rand(tokens, experts).topk(choices).indices
    experts_NK[0] = torch.tensor([0, 1, 2])
    x_ND = torch.randn(tokens, 16, device=device, requires_grad=True)
    weight_NK = torch.rand(tokens, choices, device=device, requires_grad=True)
    scale_E = torch.rand(experts, device=device)
    upstream_ND = torch.randn(tokens, 16, device=device)

    def results(first: int, count: int) -> list[Tensor]:
        own_NK = experts_NK - first
        own_NK = torch.where((own_NK >= 0) & (own_NK < count), own_NK, count)
        counts_E = own_NK.flatten().bincount(minlength=count + 1)[:count]
        rows = None if count == experts else int(counts_E.sum())
        permutation = permutation_by_expert(own_NK.to(device), counts_E.to(device), rows)

        def run(rows_RD: Tensor, weight_R: Tensor, counts_E: Tensor) -> Tensor:
            factor_R = scale_E[first : first + count].repeat_interleave(counts_E) * weight_R
            return torch.tanh(rows_RD) * factor_R[:, None]

        out_ND = run_permuted(run, x_ND, weight_NK, permutation)
        return [out_ND.detach(), *torch.autograd.grad((out_ND * upstream_ND).sum(), [x_ND, weight_NK])]

    parts = zip(*(results(first, each) for first in range(0, experts, each)), strict=True)
    for whole, part in zip(results(0, experts), parts, strict=True):
        torch.testing.assert_close(torch.stack(part).sum(0), whole, rtol=1e-5, atol=1e-6)
    assert not results(each, each)[2][0].any(), "the first token has no expert among these"
