"""Memory that the ranks of one node share: each writes into the others' by copy engine, which takes no SM from matmuls.

NCCL's kernels run on the SMs: matmuls beside them take 15 % longer. Copies between GPUs of a node by their copy engines
move 367 GB/s where NCCL gathers at 262, and cost matmuls 5 % (two H200 over NVLink, torch 2.11, 2026-11-30).

Shapes: S ranks of the group, N values of a rank's part.
"""

from __future__ import annotations

import os
import weakref

import torch
import torch.distributed as dist
from torch import Tensor

_PIECES: weakref.WeakSet[PeerMemory] = weakref.WeakSet()


class PeerMemory:
    """One piece of memory of every rank of a group, all of one size, in which each rank sees those of the others.

    Args:
        values: of each rank's piece. All ranks make their pieces in the same order.
    """

    def __init__(self, group: dist.ProcessGroup, values: int, dtype: torch.dtype, device: torch.device) -> None:
        from torch.distributed._symmetric_memory import empty, rendezvous

        self.values, self.dtype = values, dtype
        self._memory = empty(values, dtype=dtype, device=device)
        self._handle, self._rank = rendezvous(self._memory, group), group.rank()
        self.ranks = [self._handle.get_buffer(rank, (values,), dtype) for rank in range(group.size())]
        """The pieces of all ranks by their number in the group; this rank's own among them."""
        _PIECES.add(self)

    @property
    def nbytes(self) -> int:
        """Bytes of this rank's piece."""
        return self._memory.nbytes

    def own(self, first: int, values: int) -> Tensor:
        """Values of this rank's piece from `first` on, as a tensor that begins its own storage."""
        piece: Tensor = self._handle.get_buffer(self._rank, (values,), self._memory.dtype, first)
        return piece

    def barrier(self, channel: int) -> None:
        """Let the current stream go on when those of all ranks have come here, with what they wrote before.

        Args:
            channel: barriers that may be under way at the same time must have different ones.
        """
        self._handle.barrier(channel=channel)


def held_bytes() -> int:
    """Bytes of this process's pieces, which torch's allocator does not count."""
    return sum(piece.nbytes for piece in _PIECES)


def can_share(group: dist.ProcessGroup, device: torch.device) -> bool:
    """Whether the ranks of a group are GPUs of one node that reach each other's memory.

    False also where a process sees its own GPU alone, so that it cannot be told.
    """
    if device.type != "cuda" or group.size() == 1 or torch.cuda.device_count() < group.size():
        return False
    on_node = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    nodes = {rank // on_node for rank in dist.get_process_group_ranks(group)}
    others = [index for index in range(torch.cuda.device_count()) if index != torch.cuda.current_device()]
    return len(nodes) == 1 and all(
        torch.cuda.can_device_access_peer(torch.cuda.current_device(), one) for one in others
    )
