"""Equal parts that the ranks of one node send each other by copy engine, beside the main stream.

Shapes: S ranks of the group, V values of a part.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod

import torch
import torch.distributed as dist
from torch import Tensor

from cherry.distributed.lane import Lane
from cherry.distributed.peer_memory import PeerMemory


class PeerExchange:
    """All-to-all of equal parts into memory that stays: one exchange at a time, and no kernel of NCCL.

    What came lies in the box until the next exchange begins; by then the main stream must have been given all that
    reads it. All ranks exchange the same shapes in the same order.
    """

    def __init__(self, group: dist.ProcessGroup, lane: Lane) -> None:
        self.group, self.ranks, self.rank = group, group.size(), group.rank()
        self._lane = lane
        self._memory: PeerMemory | None = None
        self._targets: dict[torch.Size, list[tuple[int, Tensor]]] = {}
        """By shape. Looking them up anew takes the host longer than the copies take."""
        self._arrived: Callable[[], None] | None = None
        self.on_bytes_sent: Callable[[int], None] | None = None
        """Called with the bytes that each exchange sends to other ranks."""

    def start(self, parts: Tensor) -> None:
        """Send part s of `parts` [S, ...] to rank s; `finish` waits for what comes."""
        assert self._arrived is None, "an exchange is under way"
        memory, targets = self._memory_for(parts), self._targets_of(parts)
        with self._lane.after_main():
            memory.barrier(0)  # nobody still reads its box
            for to, target in targets:
                target.copy_(parts[to], non_blocking=True)
            memory.barrier(1)
            self._arrived = self._lane.mark()
        self._lane.keep(parts)
        if self.on_bytes_sent is not None:
            self.on_bytes_sent((self.ranks - 1) * targets[0][1].nbytes)

    def finish(self) -> None:
        """Make the main stream wait for the parts of all ranks."""
        assert self._arrived is not None, "no exchange is under way"
        arrived, self._arrived = self._arrived, None
        arrived()

    def box(self, shape: torch.Size) -> Tensor:
        """The box [S, ...]: row s is rank s's part, once the exchange is finished."""
        assert self._memory is not None, "nothing was exchanged"
        return self._memory.ranks[self.rank][: prod(shape)].view(shape)

    def _targets_of(self, parts: Tensor) -> list[tuple[int, Tensor]]:
        """The other ranks, the next one first and this one last, with the place in their boxes for its part."""
        if parts.shape not in self._targets:
            first, values = self.rank * parts[0].numel(), parts[0].numel()
            others = [(self.rank + step) % self.ranks for step in range(1, self.ranks + 1)]
            pieces = self._memory_for(parts).ranks
            self._targets[parts.shape] = [
                (to, pieces[to][first : first + values].view(parts.shape[1:])) for to in others
            ]
        return self._targets[parts.shape]

    def _memory_for(self, parts: Tensor) -> PeerMemory:
        """Memory for these parts; it grows with them."""
        held = self._memory
        if held is None or held.values < parts.numel() or held.dtype != parts.dtype:
            if held is not None:
                torch.cuda.synchronize()  # kernels may still read it
            self._targets.clear()
            held = self._memory = None  # freed before the larger one is made
            held = PeerMemory(self.group, parts.numel(), parts.dtype, parts.device)
            self._memory = held
        return held
