"""Compressed collectives: all-reduce in blockwise int8 or fp8 or in bf16, and reduce-scatter in bf16.

Values are sent compressed and summed in fp32, and every rank ends with the same bits. The all-reduce returns the
residual (this rank's compression error) for error feedback.

Shapes: N values of a flat gradient, R ranks, C values of a rank's chunk, W bytes of a chunk on the wire, K blocks of B
values.
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
"""Callback of each collective: its kind, bytes that this rank sends, and bytes of the same values in fp32."""


@dataclass(frozen=True)
class Codec:
    """Encoding of fp32 values on the wire."""

    dtype: torch.dtype
    limit: float | None
    """Magnitude that a block's largest value is scaled to; `None` for a type that needs no scale."""

    def wire_bytes(self, values: int) -> int:
        """Bytes on the wire of a chunk of `values` numbers, a multiple of BLOCK."""
        scales = 0 if self.limit is None else values // BLOCK * _SCALE_BYTES
        return values * self.dtype.itemsize + scales

    def pack(self, x_RC: Tensor) -> Tensor:
        """Encoded rows, uint8 [R, W]: rounded values, then their scales. C is a multiple of BLOCK."""
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
        """Decoded rows, fp32 [R, C], from the bytes that `pack` returned."""
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
    """Values in each rank's chunk: whole blocks, equal on all ranks."""
    return -(-values // (ranks * BLOCK)) * BLOCK


@torch.no_grad()
def all_reduce(x_N: Tensor, codec: Codec, group: dist.ProcessGroup, count: Count) -> Tensor:
    """Residual of this rank [N], fp32; `x_N` is replaced by its sum over the group, the same bits on each rank.

    Chunks go to their owners by all-to-all, are summed there in fp32, and come back by all-gather. The owner's residual
    includes its error in rounding the sum, so that summed over ranks

        result + sum(residuals) = sum(x)

    up to fp32's rounding. A non-finite value makes its block of the result invalid, but no residual.
    """
    ranks, rank, values = group.size(), group.rank(), x_N.numel()
    width = padded_chunk(values, ranks)
    x_RC = F.pad(x_N, (0, ranks * width - values)).view(ranks, width)
    sent_RW = codec.pack(x_RC)
    received_RW = torch.empty_like(sent_RW)
    dist.all_to_all_single(received_RW, sent_RW, group=group)
    chunks_RC = codec.unpack(received_RW, width)
    chunks_RC[rank] = x_RC[rank]  # the own chunk is not sent, so it is not rounded
    sum_C = chunks_RC.sum(0)
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
    """Reduce-scatter bf16 `input_N` into fp32 `output_C`, by an all-to-all and a sum in fp32.

    As many bytes as a ring reduce-scatter in bf16, which would round partial sums to bf16 on each hop.
    """
    ranks = group.size()
    chunks_N = torch.empty_like(input_N)
    dist.all_to_all_single(chunks_N, input_N, group=group)
    count("all_to_all", (ranks - 1) * 2 * output_C.numel(), (ranks - 1) * 4 * output_C.numel())
    torch.sum(chunks_N.view(ranks, -1), 0, dtype=torch.float32, out=output_C)
