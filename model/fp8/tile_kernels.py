"""Quantization kernels in Gluon that write each tile in e4m3 twice: as rows, and transposed for weight gradients.

Imported on CUDA machines only, and launched by model/fp8/cast_kernels.py.

A thread holds 8 x 8 values: it reads and writes 8 columns of a row at a time, and 8 rows of a transposed column, so
that no value changes threads. Triton without Gluon transposes tiles through shared memory, a byte at a time, and took a
quarter longer for casts and a sixth for the activation (H200, 2026-11-27, `python -m benchmarks.fp8_matmuls`).

Shapes: as in model/fp8/cast_kernels.py.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

WARPS = 8
"""Warps of one program, as the layouts below have them."""
_TILE = gl.constexpr(gl.BlockedLayout([8, 8], [8, 4], [2, 4], [1, 0]))
# The transpose of _TILE: every thread keeps its values; rows are contiguous in registers.
_TRANSPOSED = gl.constexpr(
    gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 2], [0, 4], [1, 0], [2, 0], [4, 0]],
        lane_bases=[[8, 0], [16, 0], [0, 8], [0, 16], [0, 32]],
        warp_bases=[[32, 0], [64, 0], [0, 64]],
        block_bases=[],
        shape=[128, 128],
    )
)


@gluon.jit
def _scale(amax):
    """Scale of a block, and its inverse, as in model/fp8/cast_kernels.py, whose functions Gluon cannot call."""
    scale = gl.where(amax > 1e-30, amax * (1.0 / 448.0), 1.0)
    inverse = gl.inline_asm_elementwise(
        "rcp.approx.ftz.f32 $0, $1;", "=f,f", [scale], dtype=gl.float32, is_pure=True, pack=1
    )
    return scale, inverse


@gluon.jit
def _sigmoid(x):
    return gl.inline_asm_elementwise(
        """{
        .reg .f32 t;
        mul.f32 t, $1, 0fBFB8AA3B;
        ex2.approx.ftz.f32 t, t;
        add.f32 t, t, 0f3F800000;
        rcp.approx.ftz.f32 $0, t;
        }""",
        "=f,f",
        [x],
        dtype=gl.float32,
        is_pure=True,
        pack=1,
    )


@gluon.jit
def _tile_indices(block_row, block_column):
    """Row and column indices of a tile."""
    rows = block_row * 128 + gl.arange(0, 128, layout=gl.SliceLayout(1, _TILE))
    columns = block_column * 128 + gl.arange(0, 128, layout=gl.SliceLayout(0, _TILE))
    return rows, columns


@gluon.jit
def _store_rows(x, block_row, block_column, height, width, values_ptr, scale_ptr):
    rows, columns = _tile_indices(block_row, block_column)
    scale, inverse = _scale(gl.max(gl.abs(x), 1))
    values = (x * inverse[:, None]).to(gl.float8e4nv)
    inside = (rows < height)[:, None] & (columns < width)[None, :]
    gl.store(values_ptr + rows[:, None].to(gl.int64) * width + columns[None, :], values, inside)
    gl.store(scale_ptr + block_column * (gl.cdiv(height, 128) * 128) + rows, scale)


@gluon.jit
def _store_transposed(x, block_row, block_column, height, width, values_ptr, scale_ptr):
    _, flat = _tile_indices(block_row, block_column)
    scale, inverse = _scale(gl.max(gl.abs(x), 0))
    gl.store(scale_ptr + block_row * width + flat, scale, flat < width)
    # Transposed before the cast: values that will be contiguous are packed together.
    transposed = gl.convert_layout((x * inverse[None, :]).permute((1, 0)), _TRANSPOSED, assert_trivial=True)
    rows = block_row * 128 + gl.arange(0, 128, layout=gl.SliceLayout(0, _TRANSPOSED))
    columns = block_column * 128 + gl.arange(0, 128, layout=gl.SliceLayout(1, _TRANSPOSED))
    at = columns[:, None].to(gl.int64) * (gl.cdiv(height, 128) * 128) + rows[None, :]
    gl.store(values_ptr + at, transposed.to(gl.float8e4nv), (columns < width)[:, None])


@gluon.jit
def _cast(
    x_ptr, token_ptr, group_ptr, values_ptr, scale_ptr, transposed_ptr, transposed_scale_ptr, height, width,
    GATHER: gl.constexpr,
):  # fmt: skip
    """Quantize one tile and its transpose; the grid is (row blocks, column blocks)."""
    block_row = gl.program_id(0)
    block_column = gl.program_id(1)
    rows, columns = _tile_indices(block_row, block_column)
    source = rows
    live = True
    if GATHER:
        live = gl.load(group_ptr + block_row) >= 0
        source = gl.load(token_ptr + rows)
    if live:
        here = (source >= 0) & (rows < height)
        at = source[:, None].to(gl.int64) * width + columns[None, :]
        x = gl.load(x_ptr + at, here[:, None] & (columns < width)[None, :], 0.0).to(gl.float32)
        _store_rows(x, block_row, block_column, height, width, values_ptr, scale_ptr)
        _store_transposed(x, block_row, block_column, height, width, transposed_ptr, transposed_scale_ptr)


@gluon.jit
def _swiglu_backward(
    h_ptr, weight_ptr, group_ptr, grad_ptr, act_ptr, act_scale_ptr, dh_ptr, dh_scale_ptr, dh_transposed_ptr,
    dh_transposed_scale_ptr, grad_weight_ptr, height, width,
):  # fmt: skip
    """Compute one of three parts of a tile; the grid is (part, column blocks, row blocks).

    The parts of a tile run together and share what they read; one program for all of them would hold all of it in
    registers."""
    part = gl.program_id(0)
    block_column = gl.program_id(1)
    block_row = gl.program_id(2)
    tiles = gl.num_programs(1)
    if gl.load(group_ptr + block_row) >= 0:
        rows, columns = _tile_indices(block_row, block_column)
        gate_ptr = h_ptr + rows[:, None].to(gl.int64) * (2 * width) + columns[None, :]
        narrow = rows[:, None].to(gl.int64) * width + columns[None, :]
        weight = gl.load(weight_ptr + rows)[:, None]
        # Each part loads what it needs: loaded ahead of the branches, all of it would be in registers. With `else`, the
        # compiler does move what they share ahead of them: 220 registers instead of 128, and one program less a core.
        if part == 0:
            gate = gl.load(gate_ptr).to(gl.float32)
            act = gate * _sigmoid(gate) * gl.load(gate_ptr + width).to(gl.float32)
            gl.store(grad_weight_ptr + block_column * height + rows, gl.sum(act * gl.load(grad_ptr + narrow), 1))
            _store_transposed(act * weight, block_row, block_column, height, width, act_ptr, act_scale_ptr)
        if part == 1:
            gate = gl.load(gate_ptr).to(gl.float32)
            of_up = gl.load(grad_ptr + narrow).to(gl.float32) * weight * (gate * _sigmoid(gate))
            column = block_column + tiles
            _store_rows(of_up, block_row, column, height, 2 * width, dh_ptr, dh_scale_ptr)
            _store_transposed(of_up, block_row, column, height, 2 * width, dh_transposed_ptr, dh_transposed_scale_ptr)
        if part == 2:
            gate = gl.load(gate_ptr).to(gl.float32)
            share = _sigmoid(gate)
            weighted = gl.load(grad_ptr + narrow).to(gl.float32) * weight
            up = gl.load(gate_ptr + width).to(gl.float32)
            of_gate = weighted * up * (share + gate * share * (1.0 - share))
            _store_rows(of_gate, block_row, block_column, height, 2 * width, dh_ptr, dh_scale_ptr)
            _store_transposed(
                of_gate, block_row, block_column, height, 2 * width, dh_transposed_ptr, dh_transposed_scale_ptr
            )
