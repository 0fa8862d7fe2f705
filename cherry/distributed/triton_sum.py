"""Triton kernel that sums the parts of a gradient that several ranks sent, in fp32. Imported on CUDA machines only."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 4096


@triton.jit
def _sum(own_ptr, received_ptr, total_ptr, size, stride, RANK: tl.constexpr, RANKS: tl.constexpr, ADD: tl.constexpr,
         BLOCK: tl.constexpr):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    total = tl.zeros((BLOCK,), tl.float32)
    for rank in tl.static_range(RANKS):
        if rank == RANK:
            total += tl.load(own_ptr + at, inside, 0.0).to(tl.float32)
        else:
            row = rank if rank < RANK else rank - 1
            total += tl.load(received_ptr + row * stride + at, inside, 0.0).to(tl.float32)
    if ADD:
        total += tl.load(total_ptr + at, inside, 0.0)
    tl.store(total_ptr + at, total, inside)


def sum_parts(own_N: Tensor, received_SN: Tensor, rank: int, total_N: Tensor, *, add: bool) -> None:
    """Write the fp32 sum of a part over ranks, in their order, into `total_N`, or add it there.

    Args:
        own_N: this rank's own, contiguous.
        received_SN: those of the S - 1 others in their order; rows are contiguous.
    """
    grid = (triton.cdiv(own_N.numel(), _BLOCK),)
    _sum[grid](
        own_N, received_SN, total_N, own_N.numel(), received_SN.stride(0),
        RANK=rank, RANKS=received_SN.shape[0] + 1, ADD=add, BLOCK=_BLOCK,
    )  # fmt: skip
