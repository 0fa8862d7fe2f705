"""Triton kernels of the cross-entropy: loss and in-place gradient of a row of logits, and scaling of gradients.

Imported on CUDA machines only: triton comes with torch's CUDA build.

Shapes: C tokens of a chunk, V vocabulary.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

_COLUMNS = 8192
_LOG2E = 1 / math.log(2)
_SCALE_BLOCK = 8192


@triton.jit
def _softmax_gradient(
    logits_ptr, target_ptr, loss_ptr, stride, vocab,
    IGNORE: tl.constexpr, GRADIENT: tl.constexpr, COLUMNS: tl.constexpr, LOG2E: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    line = logits_ptr + row * stride
    target = tl.load(target_ptr + row)
    # In units of log 2: exp2 and log2 are the hardware's own. Lower than any logit, but not so low that the
    # difference of two would be NaN.
    highest = tl.full([COLUMNS], -1e30, tl.float32)
    total = tl.zeros([COLUMNS], tl.float32)
    for start in range(0, vocab, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        value = tl.load(line + column, column < vocab, float("-inf")).to(tl.float32) * LOG2E
        # The larger of the two is 1 in units of itself, so one exponential serves both.
        other = tl.exp2(-tl.abs(highest - value))
        total = tl.where(value > highest, total * other + 1.0, total + other)
        highest = tl.maximum(highest, value)
    top = tl.max(highest, 0)
    log_sum = top + tl.log2(tl.sum(total * tl.exp2(highest - top), 0))
    valid = target != IGNORE
    chosen = tl.load(line + tl.where(valid, target, 0)).to(tl.float32)
    tl.store(loss_ptr + row, tl.where(valid, log_sum / LOG2E - chosen, 0.0))
    if GRADIENT:
        tl.debug_barrier()  # the chosen logit is read before it is written over
        blocks = tl.cdiv(vocab, COLUMNS)
        for back in range(blocks):  # what was read last is nearest
            column = (blocks - 1 - back) * COLUMNS + tl.arange(0, COLUMNS)
            value = tl.load(line + column, column < vocab, float("-inf")).to(tl.float32) * LOG2E
            grad = tl.exp2(value - log_sum) - tl.where(column == target, 1.0, 0.0)
            grad = tl.where(valid, grad, 0.0)
            tl.store(line + column, grad.to(logits_ptr.dtype.element_ty), column < vocab)


@triton.jit
def _scale(x_ptr, scale_ptr, out_ptr, size, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, at < size, 0.0).to(tl.float32) * tl.load(scale_ptr).to(tl.float32)
    tl.store(out_ptr + at, x.to(out_ptr.dtype.element_ty), at < size)


def scaled(x: Tensor, scale: Tensor) -> Tensor:
    """x * scale (0-dim, on the same device), in x's dtype. torch's mixed-dtype product is not vectorized."""
    x, out = x.contiguous(), torch.empty_like(x, memory_format=torch.contiguous_format)
    if x.numel():
        _scale[(triton.cdiv(x.numel(), _SCALE_BLOCK),)](x, scale, out, x.numel(), BLOCK=_SCALE_BLOCK, num_warps=8)
    return out


def softmax_gradient_(logits_CV: Tensor, targets_C: Tensor, *, ignore_index: int, gradient: bool) -> Tensor:
    """-log p(target) of each row, fp32 [C], and 0 where the target is `ignore_index`.

    With `gradient`, `logits_CV` is overwritten by the gradient of their sum. Arithmetic is fp32; each row is read once
    from device memory and once from L2.
    """
    rows, vocab = logits_CV.shape
    loss_C = torch.empty(rows, dtype=torch.float32, device=logits_CV.device)
    _softmax_gradient[(rows,)](
        logits_CV, targets_C, loss_C, logits_CV.stride(0), vocab,
        IGNORE=ignore_index, GRADIENT=gradient, COLUMNS=min(_COLUMNS, triton.next_power_of_2(vocab)), LOG2E=_LOG2E,
        num_warps=16,
    )  # fmt: skip
    return loss_C
