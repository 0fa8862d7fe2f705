"""Triton kernels of the optimizer step: the gradients' norm, and AdamW with gradient clipping in one pass.

Imported on CUDA machines only (triton comes with torch's CUDA build). A step reads each gradient twice (norm, update)
and every other number once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

_NORM_BLOCK = 8192
_STEP_BLOCK = 2048


@triton.jit
def _square_sums(grad_ptr, sums_ptr, size, BLOCK: tl.constexpr):
    program = tl.program_id(0).to(tl.int64)
    at = program * BLOCK + tl.arange(0, BLOCK)
    grad = tl.load(grad_ptr + at, at < size, 0.0).to(tl.float32)
    tl.store(sums_ptr + program, tl.sum(grad * grad, 0))


@triton.jit
def _adamw(
    param_ptr, grad_ptr, mean_ptr, square_ptr, copy_ptr, clip_ptr, step_ptr, size, rate, decay, beta1, beta2, epsilon,
    COPY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    clip = tl.load(clip_ptr)
    # With a NaN in the gradients, all tensors stay unchanged.
    if (clip == clip) & (clip >= 0.0):
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = at < size
        grad = tl.load(grad_ptr + at, inside, 0.0).to(tl.float32) * clip
        mean = tl.load(mean_ptr + at, inside, 0.0).to(tl.float32)
        square = tl.load(square_ptr + at, inside, 0.0).to(tl.float32)
        param = tl.load(param_ptr + at, inside, 0.0)
        mean += (1.0 - beta1) * (grad - mean)
        square = beta2 * square + (1.0 - beta2) * grad * grad
        # On the device, where the count of steps is: reading it would wait for all that was queued before.
        step = tl.load(step_ptr)
        mean_correction = 1.0 - tl.exp2(step * tl.log2(beta1))
        square_correction = 1.0 - tl.exp2(step * tl.log2(beta2))
        root = tl.sqrt_rn(square) / tl.sqrt_rn(square_correction) + epsilon
        param = param * (1.0 - rate * decay) - (rate / mean_correction) * mean / root
        tl.store(param_ptr + at, param, inside)
        tl.store(mean_ptr + at, mean.to(mean_ptr.dtype.element_ty), inside)
        tl.store(square_ptr + at, square.to(square_ptr.dtype.element_ty), inside)
        if COPY:
            tl.store(copy_ptr + at, param.to(copy_ptr.dtype.element_ty), inside)


def square_sum(grads: Sequence[Tensor]) -> Tensor:
    """The sum of the squares of all elements, 0-dim fp32; the same bits for the same gradients."""
    blocks = [triton.cdiv(grad.numel(), _NORM_BLOCK) for grad in grads]
    sums = torch.empty(sum(blocks), dtype=torch.float32, device=grads[0].device)
    for grad, part in zip(grads, sums.split(blocks), strict=True):
        if grad.numel():
            _square_sums[(part.numel(),)](grad, part, grad.numel(), BLOCK=_NORM_BLOCK)
    return sums.sum()


def adamw_(
    param: Tensor,
    grad: Tensor,
    mean: Tensor,
    square: Tensor,
    copy: Tensor | None,
    clip: Tensor,
    step: Tensor,
    *,
    rate: float,
    decay: float,
    betas: tuple[float, float],
    epsilon: float,
) -> None:
    """One AdamW update in place (Loshchilov and Hutter, arXiv 1711.05101), in fp32, of contiguous tensors.

    Args:
        copy: the low-precision copy, which takes the new parameter too, in its own type.
        clip: 0-dim fp32 on the device, multiplies the gradient; NaN or negative leaves all tensors unchanged.
        step: 0-dim fp32 on the device, 1 for the first update.
    """
    if not param.numel():
        return
    assert all(tensor.is_contiguous() for tensor in (param, grad, mean, square))
    beta1, beta2 = betas
    _adamw[(triton.cdiv(param.numel(), _STEP_BLOCK),)](
        param, grad, mean, square, param if copy is None else copy, clip, step, param.numel(), rate, decay,
        beta1, beta2, epsilon, COPY=copy is not None, BLOCK=_STEP_BLOCK, num_warps=8,
    )  # fmt: skip
