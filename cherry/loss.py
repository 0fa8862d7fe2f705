"""Chunked cross-entropy over a large vocabulary, with never more than one chunk's logits in memory.

The gradient of softmax cross-entropy is known as soon as the logits are: each chunk's logits are computed once, used
for loss and gradient, and freed (Liger Kernel, arXiv 2410.10989, section 3.2).

Shapes: N token, D hidden, V vocabulary, C tokens of a chunk.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

IGNORE_INDEX = -100


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, chunk: int) -> Tensor:
        needed = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        total = torch.zeros((), dtype=torch.float32, device=hidden_ND.device)
        grad_hidden_ND = torch.empty_like(hidden_ND) if needed else None
        grad_weight_VD = torch.empty(0)
        for start in range(0, hidden_ND.shape[0], chunk):
            part = slice(start, start + chunk)
            hidden_CD, targets_C = hidden_ND[part], targets_N[part]
            loss, grad_CV = _loss_and_gradient(hidden_CD @ weight_VD.T, targets_C, gradient=needed)
            total += loss
            if grad_hidden_ND is None:
                continue
            grad_hidden_ND[part] = grad_CV @ weight_VD
            if hidden_CD.shape == hidden_ND.shape:
                grad_weight_VD = grad_CV.T @ hidden_CD
            else:
                grad_weight_VD = torch.zeros_like(weight_VD, dtype=torch.float32) if start == 0 else grad_weight_VD
                grad_weight_VD += grad_CV.T @ hidden_CD
        if needed:
            ctx.save_for_backward(grad_hidden_ND, grad_weight_VD)
            ctx.weight_dtype = weight_VD.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        grad_hidden_ND, grad_weight_VD = ctx.saved_tensors
        scale = grads[0]
        return _scaled(grad_hidden_ND, scale), _scaled(grad_weight_VD, scale).to(ctx.weight_dtype), None, None


def _scaled(gradient: Tensor, scale: Tensor) -> Tensor:
    """gradient * scale (0-dim fp32), multiplied in fp32, in the gradient's dtype."""
    if gradient.is_cuda:
        from cherry.triton_loss import scaled

        return scaled(gradient, scale)
    return (gradient * scale).to(gradient.dtype)


def _loss_and_gradient(logits_CV: Tensor, targets_C: Tensor, *, gradient: bool) -> tuple[Tensor, Tensor]:
    """Summed loss of a chunk (fp32), and its gradient by the logits in their dtype; overwrites the logits."""
    if logits_CV.is_cuda:
        from cherry.triton_loss import softmax_gradient_

        return softmax_gradient_(logits_CV, targets_C, ignore_index=IGNORE_INDEX, gradient=gradient).sum(), logits_CV
    dtype, logits_CV = logits_CV.dtype, logits_CV.float()
    valid_C = targets_C != IGNORE_INDEX
    log_sum_C = logits_CV.logsumexp(dim=-1)
    index_C1 = targets_C.clamp(min=0)[:, None]
    chosen_C = logits_CV.gather(1, index_C1)[:, 0]
    loss = torch.where(valid_C, log_sum_C - chosen_C, 0.0).sum()
    if gradient:
        logits_CV = logits_CV.sub_(log_sum_C[:, None]).exp_()
        logits_CV.scatter_add_(1, index_C1, torch.full_like(index_C1, -1.0, dtype=torch.float32))
        logits_CV.mul_(valid_C[:, None])
    return loss, logits_CV.to(dtype)


def cross_entropy_sum(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, *, chunk_tokens: int) -> Tensor:
    """Sum of -log p(target) over the tokens whose target is not IGNORE_INDEX, 0-dim fp32, in nats.

    Args:
        hidden_ND: hidden states after the final norm, in the compute dtype.
        weight_VD: weight of the output head, in the same dtype.
        targets_N: int64 token ids or IGNORE_INDEX.
        chunk_tokens: tokens per chunk; memory is chunk_tokens * V * 4 bytes, and the gradients.
    """
    total: Tensor = _ChunkedCrossEntropy.apply(hidden_ND, weight_VD, targets_N, chunk_tokens)  # type: ignore[no-untyped-call]
    return total
