"""Owns how operands of fp8 matmuls are made on a GPU: e4m3 numbers with a scale every 128 of them.

It knows nothing of matmuls (model/fp8/gemm_hopper.py) or of layers, and is imported on CUDA machines only. Activations
and gradients get a scale every 128 numbers of a row and, turned round for weight gradients, every 128 rows of a column;
weights one for each 128 x 128 (DeepSeek-V3, arXiv 2412.19437, section 3.3). A scale is the largest magnitude over 448.

Shapes: R rows, N tokens, D columns, E expert, F intermediate width, T = ceil(R / 128) blocks of rows. A cast operand is
numbers [R, D] and scales [ceil(D / 128), 128 T]; turned round, numbers [D, 128 T] and scales [T, D].
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.fp8 import tile_kernels as tiles

BLOCK = 128
# Of a program of the gated activation.
_ROWS = 16
_E4M3 = torch.float8_e4m3fn


class Operand(NamedTuple):
    """Numbers and their scales."""

    values: Tensor
    scale: Tensor


@triton.jit
def _scale(amax):
    """A scale, and what its numbers are multiplied with. Where all are as good as zero it is 1: no 0 / 0."""
    scale = tl.where(amax > 1e-30, amax * (1.0 / 448.0), 1.0)
    inverse = tl.inline_asm_elementwise(
        "rcp.approx.ftz.f32 $0, $1;", "=f,f", [scale], dtype=tl.float32, is_pure=True, pack=1
    )
    return scale, inverse


@triton.jit
def _sigmoid(x):
    """1 / (1 + 2^(-x log2(e))) to two units in the last place; tl.sigmoid takes denormals apart as well."""
    return tl.inline_asm_elementwise(
        """{
        .reg .f32 t;
        mul.f32 t, $1, 0fBFB8AA3B;
        ex2.approx.ftz.f32 t, t;
        add.f32 t, t, 0f3F800000;
        rcp.approx.ftz.f32 $0, t;
        }""",
        "=f,f",
        [x],
        dtype=tl.float32,
        is_pure=True,
        pack=1,
    )


@triton.jit
def _store_rows(x, rows, columns, block, height, width, values_ptr, scale_ptr):
    scale, inverse = _scale(tl.max(tl.abs(x), 1))
    values = (x * inverse[:, None]).to(tl.float8e4nv)
    inside = (rows < height)[:, None] & (columns < width)[None, :]
    tl.store(values_ptr + rows[:, None].to(tl.int64) * width + columns[None, :], values, inside)
    tl.store(scale_ptr + block * (tl.cdiv(height, 128) * 128) + rows, scale)


@triton.jit
def _cast_weight(
    w_ptr, values_ptr, scale_ptr, turned_ptr, turned_scale_ptr, height, width,
    STRAIGHT: tl.constexpr, TURNED: tl.constexpr,
):  # fmt: skip
    block_row, block_column, expert = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    rows, columns = block_row * 128 + tl.arange(0, 128), block_column * 128 + tl.arange(0, 128)
    inside = (rows < height)[:, None] & (columns < width)[None, :]
    start = expert * height * width
    w = tl.load(w_ptr + start + rows[:, None].to(tl.int64) * width + columns[None, :], inside, 0.0).to(tl.float32)
    scale, inverse = _scale(tl.max(tl.max(tl.abs(w), 1), 0))
    values = (w * inverse).to(tl.float8e4nv)
    tall, wide = tl.num_programs(0), tl.num_programs(1)
    if TURNED:
        at = columns[:, None].to(tl.int64) * height + rows[None, :]
        tl.store(turned_ptr + start + at, tl.trans(values), tl.trans(inside))
        tl.store(turned_scale_ptr + (expert * wide + block_column) * tall + block_row, scale)
    if STRAIGHT:
        tl.store(values_ptr + start + rows[:, None].to(tl.int64) * width + columns[None, :], values, inside)
        tl.store(scale_ptr + (expert * tall + block_row) * wide + block_column, scale)


@triton.jit
def _swiglu(h_ptr, weight_ptr, group_ptr, values_ptr, scale_ptr, height, width, ROWS: tl.constexpr):
    start = tl.program_id(0) * ROWS
    if tl.load(group_ptr + start // 128) < 0:
        return
    rows, columns = start + tl.arange(0, ROWS), tl.program_id(1) * 128 + tl.arange(0, 128)
    inside = columns[None, :] < width
    at = rows[:, None].to(tl.int64) * (2 * width) + columns[None, :]
    gate = tl.load(h_ptr + at, inside, 0.0).to(tl.float32)
    up = tl.load(h_ptr + at + width, inside, 0.0).to(tl.float32)
    weight = tl.load(weight_ptr + rows)[:, None]
    _store_rows(gate * _sigmoid(gate) * up * weight, rows, columns, tl.program_id(1), height, width, values_ptr,
                scale_ptr)  # fmt: skip


def cast(x_ND: Tensor, token_R: Tensor | None = None, group_T: Tensor | None = None) -> tuple[Operand, Operand]:
    """Rows as they are, and turned round (with zeros up to a whole block).

    Args:
        token_R: int32, the row of x that each row is; -1 for zeros. `None` takes all in order.
        group_T: int32 beside it; blocks with -1 are left as they are.
    """
    rows, width = x_ND.shape[0] if token_R is None else token_R.shape[0], x_ND.shape[1]
    tall, wide = triton.cdiv(rows, BLOCK), triton.cdiv(width, BLOCK)
    plain, turned = (
        _empty(x_ND, (rows, width), (wide, BLOCK * tall)),
        _empty(x_ND, (width, BLOCK * tall), (tall, width)),
    )
    if rows:
        token, group = (x_ND, x_ND) if token_R is None or group_T is None else (token_R, group_T)
        places = rows, width
        tiles._cast[(tall, wide)](
            x_ND, token, group, *plain, *turned, *places, GATHER=token_R is not None, num_warps=tiles.WARPS
        )
    return plain, turned


def cast_weight(weight_EXD: Tensor, *, turned: bool = False) -> Operand:
    """Each expert's weight [E, X, D] in blocks of 128 x 128; `turned` round as [E, D, X]."""
    experts, height, width = weight_EXD.shape
    tall, wide = triton.cdiv(height, BLOCK), triton.cdiv(width, BLOCK)
    shape, scales = ((width, height), (wide, tall)) if turned else ((height, width), (tall, wide))
    result = _empty(weight_EXD, (experts, *shape), (experts, *scales))
    _launch_cast_weight(weight_EXD, result, result, straight=not turned, turned=turned)
    return result


def cast_both_(weight_EXD: Tensor, values_EXD: Tensor, scale: Tensor, turned_EDX: Tensor, turned_scale: Tensor) -> None:
    """Both into tensors that are there; the weight is read once."""
    plain, turned = Operand(values_EXD, scale), Operand(turned_EDX, turned_scale)
    _launch_cast_weight(weight_EXD, plain, turned, straight=True, turned=True)


def _launch_cast_weight(weight_EXD: Tensor, plain: Operand, round_: Operand, *, straight: bool, turned: bool) -> None:
    experts, height, width = weight_EXD.shape
    grid = triton.cdiv(height, BLOCK), triton.cdiv(width, BLOCK), experts
    _cast_weight[grid](weight_EXD, *plain, *round_, height, width, STRAIGHT=straight, TURNED=turned, num_warps=8)


def swiglu(h_RX: Tensor, weight_R: Tensor, group_T: Tensor) -> Operand:
    """silu(gate) * up * weight of rows that hold gate, then up. F is a multiple of 128, R too."""
    rows, width = h_RX.shape[0], h_RX.shape[1] // 2
    wide = triton.cdiv(width, BLOCK)
    act = _empty(h_RX, (rows, width), (wide, rows))
    _swiglu[(rows // _ROWS, wide)](h_RX, weight_R, group_T, *act, rows, width, ROWS=_ROWS, num_warps=4)
    return act


def swiglu_backward(
    h_RX: Tensor, weight_R: Tensor, group_T: Tensor, grad_RF: Tensor
) -> tuple[Operand, Operand, Operand, Tensor]:
    """From the gradient of `swiglu`: its result turned round, h's gradient and that turned round, and the weights'."""
    rows, width = grad_RF.shape
    tall, wide = rows // BLOCK, triton.cdiv(width, BLOCK)
    act = _empty(h_RX, (width, rows), (tall, width))
    dh, dh_turned = (
        _empty(h_RX, (rows, 2 * width), (2 * wide, rows)),
        _empty(h_RX, (2 * width, rows), (tall, 2 * width)),
    )
    parts = weight_R.new_empty(wide, rows)
    results = *act, *dh, *dh_turned, parts
    tiles._swiglu_backward[(3, wide, tall)](
        h_RX, weight_R, group_T, grad_RF, *results, rows, width, num_warps=tiles.WARPS
    )
    return act, dh, dh_turned, parts.sum(0)


def _empty(like: Tensor, shape: tuple[int, ...], scales: tuple[int, ...]) -> Operand:
    return Operand(like.new_empty(shape, dtype=_E4M3), like.new_empty(scales, dtype=torch.float32))
