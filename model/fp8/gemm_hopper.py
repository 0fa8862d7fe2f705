"""Grouped GEMM kernels for Hopper GPUs in block-scaled fp8, in Gluon: forward, input gradient and weight gradient.

Imported on CUDA machines only; operands are quantized by model/fp8/cast_kernels.py.

e4m3 operands, a scale for each 128 values of the dimension K that is summed over, and every 128 products accumulated in
fp32 by the CUDA cores (promotion): tensor cores of this generation keep 14 bits of a sum (DeepSeek-V3, arXiv
2412.19437, section 3.3.2). A producer warp fills a ring buffer of tiles by TMA. Two consumer warpgroups compute half a
tile each, so that one promotes while the other multiplies; Triton without Gluon keeps them in lockstep, and reached two
thirds of this rate.

Shapes: R rows, K summed over, N columns, E group, T = ceil(R / 128) blocks of rows. Scales are fp32, with the blocks of
the summed dimension first: [ceil(K / 128), 128 T] for rows, [E, ceil(N / 128), ceil(K / 128)] for matrices.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

# Triton 3.9 names them anew.
_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
_store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global

BLOCK = 128
# Stages of the ring buffer: 33 or 34 KiB each, beside 32 KiB for results, in 227 KiB of shared memory.
_STAGES = 5
# Three warpgroups share 65,536 registers: 168 a thread at launch; the producer releases those it does not need.
_REGISTERS, _CONSUMER_REGISTERS, _PRODUCER_REGISTERS = 168, 232, 40

_OPERAND = gl.NVMMASharedLayout.get_default_for([BLOCK, BLOCK], gl.float8e4nv)
_RESULT = gl.NVMMASharedLayout.get_default_for([BLOCK // 2, BLOCK], gl.bfloat16)
_SCALES = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=1)
# Compiled kernels, by device and GRADIENT: Triton's own dispatch on arguments takes longer than many of these matmuls.
_kernels: dict[tuple[int, bool], Any] = {}


@gluon.jit
def _tile_coordinates(tile, tiles_m, tiles_n, group_ptr, GRADIENT: gl.constexpr):
    """Group of a tile (-1: none), its row and column block, and the range of K blocks that a gradient sums over."""
    n = tile % tiles_n
    if GRADIENT:
        m = tile // tiles_n % tiles_m
        group = tile // (tiles_n * tiles_m)
        first = gl.load(group_ptr + group)
        last = gl.load(group_ptr + group + 1)
    else:
        m = tile // tiles_n
        group = gl.load(group_ptr + m)
        first = 0
        last = 0
    return group, m, n, first, last


@gluon.jit
def _produce(
    a, b, a_scale, b_scale, a_ring, b_ring, a_scales, b_scales, ready, empty, group_ptr, tiles, tiles_m, tiles_n,
    rows_a, rows_b, blocks, GRADIENT: gl.constexpr,
):  # fmt: skip
    STAGES: gl.constexpr = a_ring.type.shape[0]
    SCALE_BYTES: gl.constexpr = 1024 if GRADIENT else 512
    iteration = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        group, m, n, first, last = _tile_coordinates(tile, tiles_m, tiles_n, group_ptr, GRADIENT)
        b_row = n * 128
        if not GRADIENT:
            b_row += group * rows_b
            last = gl.where(group >= 0, blocks, 0)
        for k in range(first, last):
            slot = iteration % STAGES
            bar = ready.index(slot)
            mbarrier.wait(empty.index(slot), (iteration // STAGES & 1) ^ 1)
            mbarrier.expect(bar, a.block_type.nbytes + b.block_type.nbytes + SCALE_BYTES)
            _load(a, [m * 128, k * 128], bar, a_ring.index(slot))
            _load(b, [b_row, k * 128], bar, b_ring.index(slot))
            _load(a_scale, [k * rows_a + m * 128], bar, a_scales.index(slot))
            if GRADIENT:
                _load(b_scale, [k * rows_b + n * 128], bar, b_scales.index(slot))
            iteration += 1


@gluon.jit
def _multiply(a_ring, b_ring, ready, iteration, zero, HALF: gl.constexpr):
    """Product of an iteration's tiles, started asynchronously once they have arrived."""
    STAGES: gl.constexpr = a_ring.type.shape[0]
    slot = iteration % STAGES
    mbarrier.wait(ready.index(slot), iteration // STAGES & 1)
    a_half = a_ring.index(slot).slice(HALF * 64, 64)
    return warpgroup_mma(a_half, b_ring.index(slot).permute((1, 0)), zero, use_acc=False, is_async=True)


@gluon.jit
def _promote(
    total, product, a_scales, b_scales, b_scale, empty, iteration,
    HALF: gl.constexpr, GRADIENT: gl.constexpr, BEHIND: gl.constexpr,
):  # fmt: skip
    """Sum plus an iteration's scaled product, once at most BEHIND later products are pending; frees its tiles."""
    mma: gl.constexpr = total.type.layout
    slot = iteration % a_scales.type.shape[0]
    a_scale = a_scales.index(slot).slice(HALF * 64, 64).load(gl.SliceLayout(1, mma))
    if GRADIENT:
        b_scale = b_scales.index(slot).load(gl.SliceLayout(0, mma))
    product = warpgroup_mma_wait(num_outstanding=BEHIND, deps=(product,))
    mbarrier.arrive(empty.index(slot), count=1)
    if GRADIENT:
        total += product * a_scale[:, None] * b_scale[None, :]
    else:
        total += product * (a_scale * b_scale)[:, None]
    return total


@gluon.jit
def _consume(
    c, a_ring, b_ring, a_scales, b_scales, c_part, ready, empty, b_scale_ptr, group_ptr, tiles, tiles_m, tiles_n,
    rows_a, blocks, HALF: gl.constexpr, GRADIENT: gl.constexpr,
):  # fmt: skip
    mma: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 128, 32])
    zero = gl.zeros([64, 128], gl.float32, mma)
    iteration = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        group, m, n, first, last = _tile_coordinates(tile, tiles_m, tiles_n, group_ptr, GRADIENT)
        row = m * 128 + HALF * 64
        total = zero
        if GRADIENT:
            row += group * rows_a
            for _ in range(first, last):
                product = _multiply(a_ring, b_ring, ready, iteration, zero, HALF)
                total = _promote(total, product, a_scales, b_scales, 0.0, empty, iteration, HALF, GRADIENT, 0)
                iteration += 1
        else:
            last = gl.where(group >= 0, blocks, 0)
            scale_ptr = b_scale_ptr + (group * tiles_n + n) * blocks
            # Loaded two iterations ahead: waiting here would leave the tensor cores idle half of the time.
            following = gl.load(scale_ptr, mask=last > 0, other=0.0)
            behind = gl.load(scale_ptr + 1, mask=last > 1, other=0.0)
            # Two at a time, so that one product is promoted while the other is computed. Gradients' column scales
            # would take the registers that this needs.
            for k in range(0, last - 1, 2):
                b_scale = following
                b_scale_behind = behind
                following = gl.load(scale_ptr + k + 2, mask=k + 2 < last, other=0.0)
                behind = gl.load(scale_ptr + k + 3, mask=k + 3 < last, other=0.0)
                product = _multiply(a_ring, b_ring, ready, iteration, zero, HALF)
                product_behind = _multiply(a_ring, b_ring, ready, iteration + 1, zero, HALF)
                total = _promote(total, product, a_scales, b_scales, b_scale, empty, iteration, HALF, GRADIENT, 1)
                total = _promote(total, product_behind, a_scales, b_scales, b_scale_behind, empty, iteration + 1, HALF,
                                 GRADIENT, 0)  # fmt: skip
                iteration += 2
            if last % 2 == 1:
                product = _multiply(a_ring, b_ring, ready, iteration, zero, HALF)
                total = _promote(total, product, a_scales, b_scales, following, empty, iteration, HALF, GRADIENT, 0)
                iteration += 1
        if GRADIENT or group >= 0:
            tma.store_wait(pendings=0)
            c_part.store(total.to(c.dtype))
            fence_async_shared()
            _store(c, [row, n * 128], c_part)
    tma.store_wait(pendings=0)


# Without specialization on their values one kernel serves all sizes, and a launch need not examine its arguments.
@gluon.jit(do_not_specialize=["tiles", "tiles_m", "tiles_n", "rows_a", "rows_b", "blocks"])
def _matmul(
    a, b, c, a_scale, b_scale, b_scale_ptr, group_ptr, tiles, tiles_m, tiles_n, rows_a, rows_b, blocks,
    GRADIENT: gl.constexpr, STAGES: gl.constexpr, CONSUMER: gl.constexpr, PRODUCER: gl.constexpr,
):  # fmt: skip
    a_ring = gl.allocate_shared_memory(a.dtype, [STAGES, 128, 128], a.layout)
    b_ring = gl.allocate_shared_memory(b.dtype, [STAGES, 128, 128], b.layout)
    a_scales = gl.allocate_shared_memory(gl.float32, [STAGES, 128], a_scale.layout)
    b_scales = gl.allocate_shared_memory(gl.float32, [STAGES, 128], b_scale.layout)
    c_parts = gl.allocate_shared_memory(c.dtype, [2, 64, 128], c.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(STAGES):
        mbarrier.init(ready.index(slot), count=1)
        mbarrier.init(empty.index(slot), count=2)
    upper: gl.constexpr = 0
    lower: gl.constexpr = 1
    gl.warp_specialize(
        [
            (_consume, (c, a_ring, b_ring, a_scales, b_scales, c_parts.index(0), ready, empty, b_scale_ptr, group_ptr,
                        tiles, tiles_m, tiles_n, rows_a, blocks, upper, GRADIENT)),
            (_consume, (c, a_ring, b_ring, a_scales, b_scales, c_parts.index(1), ready, empty, b_scale_ptr, group_ptr,
                        tiles, tiles_m, tiles_n, rows_a, blocks, lower, GRADIENT)),
            (_produce, (a, b, a_scale, b_scale, a_ring, b_ring, a_scales, b_scales, ready, empty, group_ptr,
                        tiles, tiles_m, tiles_n, rows_a, rows_b, blocks, GRADIENT)),
        ],
        [4, 1],
        [CONSUMER, PRODUCER],
    )  # fmt: skip


def multiply_rows(a_RK: Tensor, a_scale: Tensor, b_ENK: Tensor, b_scale: Tensor, group_T: Tensor) -> Tensor:
    """Rows times the transposed matrix of their group, bf16 [R, N]. K and N are multiples of 16.

    Args:
        group_T: int32, the group of each block of 128 rows; with -1 its rows of the result are not written.
    """
    (rows, width), (groups, columns, _) = a_RK.shape, b_ENK.shape
    c_RN = a_RK.new_empty(rows, columns, dtype=torch.bfloat16)
    b = b_ENK.view(-1, width)
    tiles = triton.cdiv(rows, BLOCK), triton.cdiv(columns, BLOCK)
    _launch(a_RK, a_scale, b, b_scale, c_RN, group_T, tiles, b.shape[0] // groups, triton.cdiv(width, BLOCK), 0)
    return c_RN


def weight_gradients(a_NR: Tensor, a_scale: Tensor, b_KR: Tensor, b_scale: Tensor, starts_E: Tensor) -> Tensor:
    """Products of a's and b's rows over the R of each group, bf16 [E, N, K]; zeros for a group without any.

    Args:
        a_scale: [T, N], as `b_scale` is [T, K].
        starts_E: int32 [E + 1], the block of R at which each group starts, and the end. With several groups N is a
            multiple of 128.
    """
    groups, rows, columns = starts_E.shape[0] - 1, a_NR.shape[0], b_KR.shape[0]
    assert groups == 1 or rows % BLOCK == 0, "a tile of the result has rows of one group"
    c_ENK = a_NR.new_empty(groups, rows, columns, dtype=torch.bfloat16)
    tiles = triton.cdiv(rows, BLOCK), triton.cdiv(columns, BLOCK)
    _launch(a_NR, a_scale, b_KR, b_scale, c_ENK.view(-1, columns), starts_E, tiles, columns, 0, groups)
    return c_ENK


def _launch(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    c: Tensor,
    group: Tensor,
    tiles: tuple[int, int],
    rows_b: int,
    blocks: int,
    gradients: int,
) -> None:
    count = tiles[0] * tiles[1] * max(1, gradients)
    if not count:
        return
    programs = min(count, torch.cuda.get_device_properties(a.device).multi_processor_count)
    key = (a.device.index, gradients > 0)
    operand, result = [BLOCK, BLOCK], [BLOCK // 2, BLOCK]
    arguments = (
        _tile_descriptor(a, operand, _OPERAND), _tile_descriptor(b, operand, _OPERAND),
        _tile_descriptor(c, result, _RESULT), _scale_descriptor(a_scale), _scale_descriptor(b_scale),
        b_scale, group, count, *tiles, a_scale.shape[1], rows_b, blocks,
        gradients > 0, _STAGES, _CONSUMER_REGISTERS, _PRODUCER_REGISTERS,
    )  # fmt: skip
    with torch.cuda.device(a.device):
        if (kernel := _kernels.get(key)) is None:
            _kernels[key] = _matmul[(programs,)](*arguments, num_warps=4, maxnreg=_REGISTERS)
        else:
            kernel[(programs, 1, 1)](*arguments)


def _tile_descriptor(tensor: Tensor, shape: list[int], layout: gl.NVMMASharedLayout) -> TensorDescriptor:
    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), shape, layout)


def _scale_descriptor(scale: Tensor) -> TensorDescriptor:
    return TensorDescriptor(scale, [scale.numel()], [1], [BLOCK], _SCALES)
