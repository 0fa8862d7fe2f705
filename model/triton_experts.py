"""Triton kernels of the routed experts: SwiGLU forward and backward, and the unpermute's sum over top-k slots.

Imported on CUDA machines only (triton comes with torch's CUDA build).

Shapes: N token, K top-k slot of a token, R routed row, D hidden, F intermediate width, X = 2 F.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_ROWS, _COLUMNS = 16, 128


@triton.jit
def _swiglu_forward(h_ptr, weight_ptr, act_ptr, rows, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < rows)[:, None] & (column < width)[None, :]
    at = row[:, None] * (2 * width) + column[None, :]
    gate = tl.load(h_ptr + at, inside, 0.0).to(tl.float32)
    up = tl.load(h_ptr + at + width, inside, 0.0).to(tl.float32)
    weight = tl.load(weight_ptr + row, row < rows, 0.0).to(tl.float32)
    act = gate * tl.sigmoid(gate) * up * weight[:, None]
    tl.store(act_ptr + row[:, None] * width + column[None, :], act.to(act_ptr.dtype.element_ty), inside)


@triton.jit
def _swiglu_backward(
    h_ptr, weight_ptr, grad_ptr, act_ptr, grad_h_ptr, grad_weight_ptr, rows, width,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    weight = tl.load(weight_ptr + row, row < rows, 0.0).to(tl.float32)[:, None]
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, width, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        inside = (row < rows)[:, None] & (column < width)[None, :]
        at = row[:, None] * (2 * width) + column[None, :]
        narrow = row[:, None] * width + column[None, :]
        gate = tl.load(h_ptr + at, inside, 0.0).to(tl.float32)
        up = tl.load(h_ptr + at + width, inside, 0.0).to(tl.float32)
        grad = tl.load(grad_ptr + narrow, inside, 0.0).to(tl.float32)
        sigmoid = tl.sigmoid(gate)
        silu = gate * sigmoid
        total += grad * silu * up
        weighted = grad * weight
        grad_gate = weighted * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))
        tl.store(act_ptr + narrow, (silu * up * weight).to(act_ptr.dtype.element_ty), inside)
        tl.store(grad_h_ptr + at, grad_gate.to(grad_h_ptr.dtype.element_ty), inside)
        tl.store(grad_h_ptr + at + width, (weighted * silu).to(grad_h_ptr.dtype.element_ty), inside)
    tl.store(grad_weight_ptr + row, tl.sum(total, 1), row < rows)


@triton.jit
def _sum_topk(rows_ptr, inverse_ptr, out_ptr, rows, width, SLOTS: tl.constexpr, COLUMNS: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < width
    total = tl.zeros([COLUMNS], tl.float32)
    for slot in tl.static_range(SLOTS):
        row = tl.load(inverse_ptr + token * SLOTS + slot).to(tl.int64)
        total += tl.load(rows_ptr + row * width + column, inside & (row < rows), 0.0).to(tl.float32)
    tl.store(out_ptr + token * width + column, total.to(out_ptr.dtype.element_ty), inside)


def swiglu_forward(h_RX: Tensor, weight_R: Tensor) -> Tensor:
    """silu(gate) * up * weight [R, F] of `h_RX` [R, 2 F] (gate, then up), computed in fp32, in h's type."""
    rows, width = h_RX.shape[0], h_RX.shape[1] // 2
    act_RF = h_RX.new_empty(rows, width)
    grid = (triton.cdiv(rows, _ROWS), triton.cdiv(width, _COLUMNS))
    _swiglu_forward[grid](h_RX, weight_R, act_RF, rows, width, ROWS=_ROWS, COLUMNS=_COLUMNS)
    return act_RF


def swiglu_backward(h_RX: Tensor, weight_R: Tensor, grad_RF: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Result of `swiglu_forward` recomputed [R, F], and its gradients for h [R, 2 F] and weight [R] (fp32)."""
    rows, width = grad_RF.shape
    act_RF, grad_h_RX = torch.empty_like(grad_RF), torch.empty_like(h_RX)
    grad_weight_R = torch.empty(rows, dtype=torch.float32, device=h_RX.device)
    _swiglu_backward[(triton.cdiv(rows, _ROWS),)](
        h_RX, weight_R, grad_RF, act_RF, grad_h_RX, grad_weight_R, rows, width, ROWS=_ROWS, COLUMNS=_COLUMNS
    )
    return act_RF, grad_h_RX, grad_weight_R


def sum_topk(rows_RD: Tensor, inverse_NK: Tensor) -> Tensor:
    """Sum over top-k slots of each token's rows [N, D], in fp32, in the rows' type; a row of R or more adds nothing."""
    (rows, width), (tokens, slots) = rows_RD.shape, inverse_NK.shape
    out_ND = rows_RD.new_empty(tokens, width)
    columns = min(1024, triton.next_power_of_2(width))
    if tokens:
        _sum_topk[(tokens, triton.cdiv(width, columns))](
            rows_RD, inverse_NK, out_ND, rows, width, SLOTS=slots, COLUMNS=columns
        )
    return out_ND
