"""Owns sums over ranks that travel in fewer bits: blockwise int8 and fp8, bf16, and what each of them leaves behind.

It knows nothing of models or of when a gradient is ready. Values travel compressed, every sum is made in fp32, and
every rank ends with the same bits.

Shapes: N values of a flat gradient, R ranks, C values of a rank's chunk, W bytes of a chunk on the wire, K blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultAllGather

# Values that share a scale. An fp32 scale then costs 1.6 % of the bytes; smaller blocks would follow a gradient's
# local size better, which the error feedback makes up for.
BLOCK = 256
_SCALE_BYTES = 4

Count = Callable[[str, int, int], None]
"""Told of each collective: its kind, the bytes that this rank sends, and what the same values are in fp32."""


@dataclass(frozen=True)
class Codec:
    """How fp32 values look on the wire."""

    dtype: torch.dtype
    limit: float | None
    """What a block's largest magnitude is scaled to; `None` for a type that needs no scale."""

    def wire_bytes(self, values: int) -> int:
        """Bytes of a chunk of `values`, a multiple of BLOCK."""
        scales = 0 if self.limit is None else values // BLOCK * _SCALE_BYTES
        return values * self.dtype.itemsize + scales

    def pack(self, x_RC: Tensor) -> Tensor:
        """Rounded values and then their scales, row by row: uint8 [R, W]. C is a multiple of BLOCK."""
        rows, width = x_RC.shape
        if self.limit is None:
            return x_RC.to(self.dtype).view(torch.uint8)
        x_RKB = x_RC.view(rows, -1, BLOCK)
        largest_RK1 = torch.linalg.vector_norm(x_RKB, float("inf"), dim=-1, keepdim=True)
        # A block of zeros has no scale; the smallest normal number keeps 0 / 0 out. NaN and infinity go through.
        scale_RK1 = (largest_RK1 / self.limit).clamp_min_(torch.finfo(torch.float32).tiny)
        scaled_RKB = x_RKB / scale_RK1
        if not self.dtype.is_floating_point:
            scaled_RKB.round_()
        values_RC = scaled_RKB.clamp_(-self.limit, self.limit).to(self.dtype).view(rows, width)
        wire_RW = torch.empty(rows, self.wire_bytes(width), dtype=torch.uint8, device=x_RC.device)
        wire_RW[:, :width] = values_RC.view(torch.uint8)
        wire_RW[:, width:] = scale_RK1.view(rows, -1).view(torch.uint8)
        return wire_RW

    def unpack(self, wire_RW: Tensor, width: int) -> Tensor:
        """What `pack` wrote, as fp32 [R, C]."""
        if self.limit is None:
            return wire_RW.view(self.dtype).float()
        rows = wire_RW.shape[0]
        x_RKB = wire_RW[:, :width].view(self.dtype).float().view(rows, -1, BLOCK)
        return x_RKB.mul_(wire_RW[:, width:].view(torch.float32).unsqueeze(-1)).view(rows, width)


CODECS = {
    "bf16": Codec(torch.bfloat16, None),
    "int8": Codec(torch.int8, 127.0),
    "fp8": Codec(torch.float8_e4m3fn, 448.0),  # e4m3: largest finite value
}


def padded_chunk(values: int, ranks: int) -> int:
    """Values of each rank's chunk: whole blocks, equal on all ranks."""
    return -(-values // (ranks * BLOCK)) * BLOCK


@torch.no_grad()
def all_reduce(x_N: Tensor, codec: Codec, group: dist.ProcessGroup, count: Count) -> Tensor:
    """Replace fp32 `x_N` by its sum over the group, the same bits on each rank; what this rank failed to send [N].

    Chunks go to their owners by all-to-all, are summed there in fp32, and come back by all-gather. The error that an
    owner makes in rounding the sum is part of what it returns, so that summed over ranks

        result + sum(returned) = sum(x)

    up to fp32's rounding. A value that is not finite spoils its block of the result, but nothing that is returned.
    """
    ranks, rank, values = group.size(), group.rank(), x_N.numel()
    width = padded_chunk(values, ranks)
    x_RC = F.pad(x_N, (0, ranks * width - values)).view(ranks, width)
    sent_RW = codec.pack(x_RC)
    received_RW = torch.empty_like(sent_RW)
    dist.all_to_all_single(received_RW, sent_RW, group=group)
    parts_RC = codec.unpack(received_RW, width)
    parts_RC[rank] = x_RC[rank]  # the own chunk travels nowhere, so it is not rounded
    sum_C = parts_RC.sum(0)
    result_RW = torch.empty_like(sent_RW)
    DefaultAllGather()(result_RW, codec.pack(sum_C[None]), group)
    for kind in ("all_to_all", "all_gather"):
        count(kind, (ranks - 1) * codec.wire_bytes(width), 4 * values * (ranks - 1) // ranks)
    result_RC = codec.unpack(result_RW, width)
    x_RC -= codec.unpack(sent_RW, width)
    x_RC[rank] = sum_C - result_RC[rank]
    x_N.copy_(result_RC.view(-1)[:values])
    return x_RC.nan_to_num_(0.0, 0.0, 0.0).view(-1)[:values]


@torch.no_grad()
def reduce_scatter_bf16(output_C: Tensor, input_N: Tensor, group: dist.ProcessGroup, count: Count) -> None:
    """The group's sum of this rank's chunk: bf16 `input_N` by all-to-all, summed in fp32 into `output_C`.

    As many bytes as a bf16 reduce-scatter, whose partial sums would be rounded to bf16 on each hop of the ring.
    """
    ranks = group.size()
    parts_N = torch.empty_like(input_N)
    dist.all_to_all_single(parts_N, input_N, group=group)
    count("all_to_all", (ranks - 1) * 2 * output_C.numel(), (ranks - 1) * 4 * output_C.numel())
    torch.sum(parts_N.view(ranks, -1), 0, dtype=torch.float32, out=output_C)
