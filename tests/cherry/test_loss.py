"""The chunked cross-entropy against torch's own on all logits at once, and what the MTP module has to predict."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cherry.loss import IGNORE_INDEX, cross_entropy_sum

TOKENS, WIDTH, VOCAB = 37, 16, 101
# Weights of the main and the MTP loss: one head takes part in both.
SCALES = (0.7, 0.3)


def inputs(scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden_ND = scale * torch.randn(TOKENS, WIDTH, generator=generator)
    weight_VD = torch.randn(VOCAB, WIDTH, generator=generator)
    targets_N = torch.randint(VOCAB, (TOKENS,), generator=generator)
    targets_N[::5] = IGNORE_INDEX
    return hidden_ND, weight_VD, targets_N


def reference(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and gradients in float64."""
    hidden_ND = hidden_ND.double().requires_grad_()
    weight_VD = weight_VD.double().requires_grad_()
    loss = F.cross_entropy(hidden_ND @ weight_VD.T, targets_N, ignore_index=IGNORE_INDEX, reduction="sum")
    return loss, *torch.autograd.grad(loss, (hidden_ND, weight_VD))


@pytest.mark.parametrize("chunk", [1, 8, 36, 37, 1000])
def test_loss_and_gradients_are_those_of_all_logits_at_once(chunk: int) -> None:
    hidden_ND, weight_VD, targets_N = inputs()
    expected, *gradients = reference(hidden_ND, weight_VD, targets_N)
    hidden_ND.requires_grad_(), weight_VD.requires_grad_()
    loss = cross_entropy_sum(hidden_ND, weight_VD, targets_N, chunk_tokens=chunk)
    assert (loss.dtype, loss.shape) == (torch.float32, ())
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    for ours, theirs in zip(torch.autograd.grad(loss, (hidden_ND, weight_VD)), gradients, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5)


def test_logits_of_a_thousand_do_not_overflow() -> None:
    hidden_ND, weight_VD, targets_N = inputs(scale=300.0)
    expected, gradient_ND, _ = reference(hidden_ND, weight_VD, targets_N)
    assert (hidden_ND @ weight_VD.T).max() > 1000
    loss = cross_entropy_sum(hidden_ND.requires_grad_(), weight_VD, targets_N, chunk_tokens=8)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(torch.autograd.grad(loss, hidden_ND)[0].double(), gradient_ND, rtol=1e-3, atol=1e-3)


def test_a_head_in_two_scaled_losses_gets_both_gradients() -> None:
    hidden_ND, weight_VD, targets_N = inputs()
    rolled_ND = hidden_ND.roll(1, 0)
    _, _, main_VD = reference(hidden_ND, weight_VD, targets_N)
    _, _, mtp_VD = reference(rolled_ND, weight_VD, targets_N)
    weight_VD.requires_grad_()
    total = sum(
        scale * cross_entropy_sum(hidden, weight_VD, targets_N, chunk_tokens=10)
        for scale, hidden in zip(SCALES, (hidden_ND, rolled_ND), strict=True)
    )
    (gradient_VD,) = torch.autograd.grad(total, weight_VD)
    expected_VD = SCALES[0] * main_VD + SCALES[1] * mtp_VD
    torch.testing.assert_close(gradient_VD.double(), expected_VD, rtol=1e-5, atol=1e-5)


def test_tokens_that_bear_no_loss_have_no_gradient() -> None:
    hidden_ND, weight_VD, targets_N = inputs()
    loss = cross_entropy_sum(hidden_ND.requires_grad_(), weight_VD, targets_N, chunk_tokens=8)
    (gradient_ND,) = torch.autograd.grad(loss, hidden_ND)
    ignored_N = targets_N == IGNORE_INDEX
    assert not gradient_ND[ignored_N].any()
    assert gradient_ND[~ignored_N].any(dim=1).all()
    nothing_N = torch.full_like(targets_N, IGNORE_INDEX)
    loss = cross_entropy_sum(hidden_ND, weight_VD.requires_grad_(), nothing_N, chunk_tokens=8)
    assert loss == 0
    assert not any(gradient.any() for gradient in torch.autograd.grad(loss, (hidden_ND, weight_VD)))


def test_without_gradients_the_loss_is_the_same() -> None:
    hidden_ND, weight_VD, targets_N = inputs()
    with torch.no_grad():
        plain = cross_entropy_sum(hidden_ND, weight_VD, targets_N, chunk_tokens=8)
    assert not plain.requires_grad
    assert plain == cross_entropy_sum(hidden_ND.requires_grad_(), weight_VD, targets_N, chunk_tokens=8)


def test_bf16_sums_in_fp32() -> None:
    hidden_ND, weight_VD, targets_N = (t.bfloat16() if t.is_floating_point() else t for t in inputs())
    expected, gradient_ND, gradient_VD = reference(hidden_ND, weight_VD, targets_N)
    hidden_ND.requires_grad_(), weight_VD.requires_grad_()
    loss = cross_entropy_sum(hidden_ND, weight_VD, targets_N, chunk_tokens=8)
    # 2^-8 is a bf16 number's rounding; the logits are bf16 once, the sum of the losses never.
    assert loss.item() == pytest.approx(expected.item(), rel=2**-8)
    for ours, theirs in zip(torch.autograd.grad(loss, (hidden_ND, weight_VD)), (gradient_ND, gradient_VD), strict=True):
        assert ours.dtype == torch.bfloat16
        assert (ours.double() - theirs).norm() < 0.02 * theirs.norm()
