"""Reference implementation of model/fp8/ops.py in plain torch: the same quantization, products in fp32.

The operators of CPU tensors, so that code around them runs anywhere; tests compare the kernels with it.

Shapes: as in model/fp8/ops.py; R rows, T = ceil(R / 128) blocks of them.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from model.experts import sum_topk

BLOCK = 128
E4M3 = torch.float8_e4m3fn


def _scale(largest: Tensor) -> Tensor:
    """Scales of blocks with these largest magnitudes; 1 where all values are negligible: no 0 / 0."""
    return torch.where(largest > 1e-30, largest / 448, 1)


def cast_rows(x_RD: Tensor) -> tuple[Tensor, Tensor]:
    """Quantized values [R, D] and scales [ceil(D / 128), 128 T]."""
    rows, width = x_RD.shape
    padded = F.pad(x_RD.float(), (0, -width % BLOCK, 0, -rows % BLOCK))
    groups = padded.view(padded.shape[0], -1, BLOCK)
    scale = _scale(groups.abs().amax(-1))
    values = (groups / scale[..., None]).to(E4M3).flatten(1)
    return values[:rows, :width].contiguous(), scale.t().contiguous()


def cast_transposed(x_RD: Tensor) -> tuple[Tensor, Tensor]:
    """Quantized values of the transpose [D, 128 T] and scales [T, D]."""
    values, scale = cast_rows(F.pad(x_RD, (0, 0, 0, -x_RD.shape[0] % BLOCK)).t())
    return values, scale[:, : x_RD.shape[1]].contiguous()


def dequantize_rows(values: Tensor, scale: Tensor) -> Tensor:
    """Values, fp32, of quantized rows [R, D] or of transposed ones [D, 128 T]."""
    return values.float() * scale.t()[: len(values)].repeat_interleave(BLOCK, 1)[:, : values.shape[1]]


def dequantize_weights(values: Tensor, scale: Tensor) -> Tensor:
    """Values of quantized weights [E, X, D], fp32."""
    wide = scale.repeat_interleave(BLOCK, 1)[:, : values.shape[1]].repeat_interleave(BLOCK, 2)[:, :, : values.shape[2]]
    return values.float() * wide


def cast_weight(weight_EXD: Tensor, transposed: bool) -> tuple[Tensor, ...]:
    """Values and scales of quantized weights; see `model.fp8.ops.cast_weight`."""
    experts, height, width = weight_EXD.shape
    padded = F.pad(weight_EXD.float(), (0, -width % BLOCK, 0, -height % BLOCK))
    blocks = padded.view(experts, padded.shape[1] // BLOCK, BLOCK, -1, BLOCK)
    scale = _scale(blocks.abs().amax((2, 4)))
    values = (blocks / scale[:, :, None, :, None]).flatten(3).flatten(1, 2)[:, :height, :width]
    if transposed:
        values, scale = values.transpose(1, 2), scale.transpose(1, 2)
    return values.to(E4M3).contiguous(), scale.contiguous()


def linear_forward(x: Tensor, weight: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
    """Product, and x transposed with its scales; see `model.fp8.ops.linear_forward`."""
    return (dequantize_rows(*cast_rows(x)) @ dequantize_weights(weight, scale)[0].t()).bfloat16(), *cast_transposed(x)


def linear_backward(
    grad: Tensor, weight: Tensor, scale: Tensor, x: Tensor, x_scale: Tensor, trained: bool
) -> tuple[Tensor, ...]:
    """Gradients of x and of the weight; see `model.fp8.ops.linear_backward`."""
    grad_x = (dequantize_rows(*cast_rows(grad)) @ dequantize_weights(weight, scale)[0].t()).bfloat16()
    if not trained:
        return grad_x, grad.new_empty(0)
    return grad_x, (dequantize_rows(*cast_transposed(grad)) @ dequantize_rows(x, x_scale).t()).bfloat16()


def _multiply(rows: tuple[Tensor, Tensor], weight: Tensor, scale: Tensor, expert_T: Tensor) -> Tensor:
    x, matrices = dequantize_rows(*rows), dequantize_weights(weight, scale)
    blocks = zip(torch.split(x, BLOCK), expert_T.tolist(), strict=True)
    products = [block @ matrices[e].t() if e >= 0 else block.new_zeros(BLOCK, matrices.shape[1]) for block, e in blocks]
    return torch.cat(products).bfloat16()


def _gradients(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor], starts_E: Tensor) -> Tensor:
    left, right, starts = dequantize_rows(*a), dequantize_rows(*b), (BLOCK * starts_E).tolist()
    products = [left[:, i:j] @ right[:, i:j].t() for i, j in pairwise(starts)]
    return torch.stack(products).bfloat16()


def _rows(x_ND: Tensor, token_P: Tensor) -> Tensor:
    return torch.where(token_P[:, None] >= 0, x_ND[token_P.clamp(min=0).long()], 0)


def experts_forward(
    x: Tensor,
    weight: Tensor,
    token: Tensor,
    place: Tensor,
    expert: Tensor,
    w13: Tensor,
    w13_scale: Tensor,
    w2: Tensor,
    w2_scale: Tensor,
) -> tuple[Tensor, ...]:
    """Combined outputs and tensors for the backward pass; see `model.fp8.ops.experts_forward`."""
    rows = _rows(x, token)
    h = _multiply(cast_rows(rows), w13, w13_scale, expert)
    gate, up = h.float().chunk(2, dim=1)
    out = _multiply(cast_rows(F.silu(gate) * up * weight[:, None]), w2, w2_scale, expert)
    return sum_topk(F.pad(out, (0, 0, 0, 1)), place), *cast_transposed(rows), h


def experts_backward(
    grad: Tensor,
    weight: Tensor,
    token: Tensor,
    place: Tensor,
    expert: Tensor,
    starts: Tensor,
    w13: Tensor,
    w13_scale: Tensor,
    w2: Tensor,
    w2_scale: Tensor,
    x: Tensor,
    x_scale: Tensor,
    h: Tensor,
    trained: bool,
) -> tuple[Tensor, ...]:
    """Gradients of x, of row weights, of w13 and of w2; see `model.fp8.ops.experts_backward`."""
    rows = _rows(grad, token)
    grad_act = _multiply(cast_rows(rows), w2, w2_scale, expert).float()
    gate, up = (half.requires_grad_() for half in h.float().chunk(2, dim=1))
    scale = weight.clone().requires_grad_()
    with torch.enable_grad():
        act = F.silu(gate) * up * scale[:, None]
    grad_gate, grad_up, grad_weight = torch.autograd.grad(act, [gate, up, scale], grad_act)
    grad_h = torch.cat([grad_gate, grad_up], dim=1)
    grad_w13, grad_w2 = grad.new_empty(0), grad.new_empty(0)
    if trained:
        grad_w2 = _gradients(cast_transposed(rows), cast_transposed(act.detach()), starts)
        grad_w13 = _gradients(cast_transposed(grad_h), (x, x_scale), starts)
    grad_x = _multiply(cast_rows(grad_h), w13, w13_scale, expert)
    return sum_topk(F.pad(grad_x, (0, 0, 0, 1)), place), grad_weight, grad_w13, grad_w2
