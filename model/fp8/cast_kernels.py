"""Quantization kernels for fp8 matmuls on a GPU: casts to e4m3 with a scale for each block of 128 values, in Triton.

Imported on CUDA machines only; the matmuls are in model/fp8/gemm_hopper.py. Activations and gradients get a scale for
each 1 x 128 values of a row and, transposed for weight gradients, for each 128 x 1 of a column; weights one for each
128 x 128 (DeepSeek-V3, arXiv 2412.19437, section 3.3). A scale is the largest magnitude over 448.

Shapes: R rows, N tokens, D columns, E expert, F intermediate width, X rows of a weight, T = ceil(R / 128) blocks of
rows. A quantized operand is values [R, D] and scales [ceil(D / 128), 128 T]; transposed, values [D, 128 T] and scales
[T, D].
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.fp8 import tile_kernels as tiles

BLOCK = 128
# Rows of one program of the gated activation.
_ROWS = 16
_E4M3 = torch.float8_e4m3fn


class Operand(NamedTuple):
    """Operand of an fp8 matmul: e4m3 values and their fp32 scales."""

    values: Tensor
    scale: Tensor


@triton.jit
def _scale(amax):
    """Scale of a block, and its inverse. The scale is 1 where all values are negligible: no 0 / 0."""
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
    w_ptr, values_ptr, scale_ptr, transposed_ptr, transposed_scale_ptr, height, width,
    PLAIN: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    block_row, block_column, expert = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    rows, columns = block_row * 128 + tl.arange(0, 128), block_column * 128 + tl.arange(0, 128)
    inside = (rows < height)[:, None] & (columns < width)[None, :]
    start = expert * height * width
    w = tl.load(w_ptr + start + rows[:, None].to(tl.int64) * width + columns[None, :], inside, 0.0).to(tl.float32)
    scale, inverse = _scale(tl.max(tl.max(tl.abs(w), 1), 0))
    values = (w * inverse).to(tl.float8e4nv)
    tall, wide = tl.num_programs(0), tl.num_programs(1)
    if TRANSPOSED:
        at = columns[:, None].to(tl.int64) * height + rows[None, :]
        tl.store(transposed_ptr + start + at, tl.trans(values), tl.trans(inside))
        tl.store(transposed_scale_ptr + (expert * wide + block_column) * tall + block_row, scale)
    if PLAIN:
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
    """Quantized rows [R, D], and their transpose [D, 128 T] (padded with zeros to whole blocks).

    Args:
        token_R: int32, the row of x that each row is; -1 for zeros. `None` takes all rows in order.
        group_T: int32, given with `token_R`; blocks of the results with -1 are not written.
    """
    rows, width = x_ND.shape[0] if token_R is None else token_R.shape[0], x_ND.shape[1]
    tall, wide = triton.cdiv(rows, BLOCK), triton.cdiv(width, BLOCK)
    plain, transposed = (
        _empty(x_ND, (rows, width), (wide, BLOCK * tall)),
        _empty(x_ND, (width, BLOCK * tall), (tall, width)),
    )
    if rows:
        token, group = (x_ND, x_ND) if token_R is None or group_T is None else (token_R, group_T)
        places = rows, width
        tiles._cast[(tall, wide)](
            x_ND, token, group, *plain, *transposed, *places, GATHER=token_R is not None, num_warps=tiles.WARPS
        )
    return plain, transposed


def cast_weight(weight_EXD: Tensor, *, transposed: bool = False) -> Operand:
    """Quantized weights [E, X, D] in blocks of 128 x 128; [E, D, X] if `transposed`."""
    experts, height, width = weight_EXD.shape
    tall, wide = triton.cdiv(height, BLOCK), triton.cdiv(width, BLOCK)
    shape, scales = ((width, height), (wide, tall)) if transposed else ((height, width), (tall, wide))
    result = _empty(weight_EXD, (experts, *shape), (experts, *scales))
    _launch_cast_weight(weight_EXD, result, result, store_plain=not transposed, store_transposed=transposed)
    return result


def cast_both_(
    weight_EXD: Tensor, values_EXD: Tensor, scale: Tensor, transposed_EDX: Tensor, transposed_scale: Tensor
) -> None:
    """Quantize a weight both ways into the given tensors [E, X, D] and [E, D, X]; the weight is read once."""
    plain, transposed = Operand(values_EXD, scale), Operand(transposed_EDX, transposed_scale)
    _launch_cast_weight(weight_EXD, plain, transposed, store_plain=True, store_transposed=True)


def _launch_cast_weight(
    weight_EXD: Tensor, plain: Operand, transposed: Operand, *, store_plain: bool, store_transposed: bool
) -> None:
    experts, height, width = weight_EXD.shape
    grid = triton.cdiv(height, BLOCK), triton.cdiv(width, BLOCK), experts
    _cast_weight[grid](
        weight_EXD, *plain, *transposed, height, width, PLAIN=store_plain, TRANSPOSED=store_transposed, num_warps=8
    )


def swiglu(h_RX: Tensor, weight_R: Tensor, group_T: Tensor) -> Operand:
    """Quantized silu(gate) * up * weight [R, F] of rows that hold gate, then up. F and R are multiples of 128."""
    rows, width = h_RX.shape[0], h_RX.shape[1] // 2
    wide = triton.cdiv(width, BLOCK)
    act = _empty(h_RX, (rows, width), (wide, rows))
    _swiglu[(rows // _ROWS, wide)](h_RX, weight_R, group_T, *act, rows, width, ROWS=_ROWS, num_warps=4)
    return act


def swiglu_backward(
    h_RX: Tensor, weight_R: Tensor, group_T: Tensor, grad_RF: Tensor
) -> tuple[Operand, Operand, Operand, Tensor]:
    """Transposed result of `swiglu` [F, R], gradient of h [R, 2 F] and its transpose, gradient of weight [R].

    Args:
        grad_RF: gradient of the result of `swiglu`.
    """
    rows, width = grad_RF.shape
    tall, wide = rows // BLOCK, triton.cdiv(width, BLOCK)
    act = _empty(h_RX, (width, rows), (tall, width))
    dh, dh_transposed = (
        _empty(h_RX, (rows, 2 * width), (2 * wide, rows)),
        _empty(h_RX, (2 * width, rows), (tall, 2 * width)),
    )
    partial_sums = weight_R.new_empty(wide, rows)
    results = *act, *dh, *dh_transposed, partial_sums
    tiles._swiglu_backward[(3, wide, tall)](
        h_RX, weight_R, group_T, grad_RF, *results, rows, width, num_warps=tiles.WARPS
    )
    return act, dh, dh_transposed, partial_sums.sum(0)


def _empty(like: Tensor, shape: tuple[int, ...], scales: tuple[int, ...]) -> Operand:
    return Operand(like.new_empty(shape, dtype=_E4M3), like.new_empty(scales, dtype=torch.float32))
