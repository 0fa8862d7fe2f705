"""Strips of rows, in which a weight is worked through without an fp32 copy of all of it, and 4-bit codes in bytes.

Shapes: R row, C column, B = C / 2 byte.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

# 1 MiB of fp32: it stays in the caches, and an operation on it takes much longer than its call. Measured 2026-11 on an
# EPYC core with 1 MiB of its own: 8 bits per channel take 1.8 GB/s of bf16 with a quarter of it, 3.0 with this.
_VALUES = 1 << 18


def strips(values_RC: Tensor, block: int | None = None) -> Iterator[slice]:
    """Slices of rows, in order; on a GPU one of all rows, for there every operation is a launch.

    Args:
        block: rows that share scales: no slice has rows of two blocks then, also not on a GPU.
    """
    rows, height = values_RC.shape[0], _height(values_RC)
    block = block or max(1, rows)
    # Parts of a block of nearly one size.
    height = math.ceil(block / math.ceil(block / height)) if block < rows else height
    for start in range(0, rows, block):
        stop = min(rows, start + block)
        for first in range(start, stop, height):
            yield slice(first, min(stop, first + height))


def scratch(values_RC: Tensor) -> Tensor:
    """Uninitialized fp32 memory [R, C] for the largest of the `strips`."""
    return torch.empty(_height(values_RC), values_RC.shape[1], device=values_RC.device)


def _height(values_RC: Tensor) -> int:
    rows, columns = values_RC.shape
    return max(1, rows if values_RC.device.type != "cpu" else min(rows, _VALUES // max(1, columns)))


def as_rows(tensor: Tensor) -> Tensor:
    """View [R, C] of a tensor of any number of dimensions; one of fewer than two is a row."""
    return tensor.reshape(1, -1) if tensor.dim() < 2 else tensor.flatten(1)


def largest_magnitude(values: Tensor, dim: int) -> Tensor:
    """Largest magnitude along one dimension, which stays with size 1."""
    if values.itemsize == 2:
        # Floats without their sign are ordered like the integers of the same bits, which a CPU compares faster.
        return (values.view(torch.int16) & 0x7FFF).amax(dim, keepdim=True).view(values.dtype)
    # Without a copy of the values, as `abs` would make.
    return torch.maximum(values.amax(dim, keepdim=True), values.amin(dim, keepdim=True).neg_())


def pack_nibbles(codes_RC: Tensor) -> Tensor:
    """uint8 [R, B] of contiguous uint8 codes 0 to 15, the first of two in the lower bits."""
    # A 16-bit number of two codes; the first is its lower byte on every machine that torch runs on.
    pairs_RB = codes_RC.view(torch.int16)
    return (pairs_RB >> 4).bitwise_or_(pairs_RB).to(torch.uint8)


def unpack_nibbles(packed_RB: Tensor) -> Tensor:
    """uint8 codes [R, C]; the reverse of `pack_nibbles`."""
    pairs_RB = packed_RB.to(torch.int16)
    return (pairs_RB << 4).bitwise_or_(pairs_RB).bitwise_and_(0x0F0F).view(torch.uint8)
