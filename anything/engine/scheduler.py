"""Scheduler of the embedded engine: continuous batching with chunked prefill over a paged cache.

It needs neither tensors nor threads: the engine loop asks it for a step's chunks, runs them, and updates it from the
output.

Iteration-level scheduling as in Orca (OSDI 2022), blocks and preemption by recomputation as in PagedAttention
(arXiv 2309.06180, section 4.5).
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from anything.protocol import FinishReason, UnavailableError

# Seconds until a refused client may ask again: about one generation of the embedded default.
_RETRY_AFTER_S = 1


@dataclass(eq=False)
class Sequence:
    """State of one generation in the scheduler. `order` grows with arrival."""

    order: int
    prompt: list[int]
    max_new_tokens: int
    generated: list[int] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)
    computed: int = 0
    """Number of tokens whose latents are in the cache."""

    def __post_init__(self) -> None:
        assert self.prompt and self.max_new_tokens > 0

    @property
    def length(self) -> int:
        """Number of tokens so far, prompt and generated."""
        return len(self.prompt) + len(self.generated)

    @property
    def remaining(self) -> int:
        """Number of tokens that are not in the cache yet; 1 during decode."""
        return self.length - self.computed

    def tokens(self, start: int, count: int) -> list[int]:
        """Token ids at positions [start, start + count)."""
        known = len(self.prompt)
        if start >= known:
            return self.generated[start - known : start - known + count]
        return (self.prompt[start:] + self.generated[: max(0, start + count - known)])[:count]


@dataclass(frozen=True)
class ScheduledChunk:
    """Tokens [start, start + count) of one sequence that a step computes: a chunk of a prefill, or one decode token.

    A copy: the sequence may be cancelled, and so lose its blocks, while the step runs. Writes to them are then
    harmless, for they are allocated again only in a later step.
    """

    sequence: Sequence
    start: int
    tokens: tuple[int, ...]
    blocks: tuple[int, ...]
    samples: bool
    """Whether these are the sequence's last tokens, so that the step samples a new one."""

    @property
    def count(self) -> int:
        """Number of tokens."""
        return len(self.tokens)


class BlockAllocator:
    """Allocator of cache blocks by index. Each block is free or owned once."""

    def __init__(self, blocks: int) -> None:
        self.blocks = blocks
        self._free = deque(range(blocks))
        self._owned: set[int] = set()

    @property
    def free(self) -> int:
        """Number of free blocks."""
        return len(self._free)

    def allocate(self) -> int:
        """Index of a block that was free; the caller has checked that there is one."""
        block = self._free.popleft()
        self._owned.add(block)
        return block

    def release(self, blocks: list[int]) -> None:
        """Free blocks, which must be allocated."""
        for block in blocks:
            assert block in self._owned, f"block {block} is freed twice"
            self._owned.remove(block)
            self._free.append(block)


class Scheduler:
    """First-come, first-served scheduler: no sequence is admitted before an older one; the youngest is preempted.

    Every sequence finishes: the oldest one always gets the blocks it needs, and a single sequence may fill
    `capacity_tokens`.
    """

    def __init__(
        self, *, blocks: int, block_tokens: int, max_running: int, prefill_chunk_tokens: int, max_waiting: int
    ) -> None:
        self.block_tokens = block_tokens
        self._max_running = max_running
        self._chunk_tokens = prefill_chunk_tokens
        self._max_waiting = max_waiting
        self._allocator = BlockAllocator(blocks)
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []  # by age
        self._next_order = 0
        self.preemptions = 0

    @property
    def capacity_tokens(self) -> int:
        """Capacity of the whole cache in tokens."""
        return self._allocator.blocks * self.block_tokens

    @property
    def free_blocks(self) -> int:
        """Number of free cache blocks."""
        return self._allocator.free

    @property
    def waiting(self) -> int:
        """Number of sequences that are not admitted or were preempted."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Number of admitted sequences."""
        return len(self._running)

    def add(self, prompt: list[int], max_new_tokens: int) -> Sequence:
        """New waiting sequence, whose prompt and output must fit `capacity_tokens`.

        Raises:
            UnavailableError: max_waiting sequences are queued already (HTTP 429).
        """
        assert len(prompt) + max_new_tokens <= self.capacity_tokens
        if len(self._waiting) >= self._max_waiting:
            raise UnavailableError(
                f"{len(self._waiting)} requests are waiting already, which is the limit. Try again later.",
                status=429,
                code="overloaded",
                retry_after_s=_RETRY_AFTER_S,
            )
        sequence = Sequence(self._next_order, prompt, max_new_tokens)
        self._next_order += 1
        self._waiting.append(sequence)
        return sequence

    def cancel(self, sequence: Sequence) -> bool:
        """Remove a sequence and free its blocks; False when it had finished or was cancelled before."""
        if sequence in self._running:
            self._running.remove(sequence)
        elif sequence in self._waiting:
            self._waiting.remove(sequence)
        else:
            return False
        self._free(sequence)
        return True

    def schedule(self) -> list[ScheduledChunk]:
        """Chunks of the next step, oldest sequence first; empty when there is nothing to do.

        Every decoding sequence takes one token; prefills share prefill_chunk_tokens per step.
        """
        chunks: list[ScheduledChunk] = []
        budget = self._chunk_tokens
        preempted = False
        position = 0
        while position < len(self._running):
            sequence = self._running[position]
            count = 1 if sequence.remaining == 1 else min(sequence.remaining, budget)
            if count:
                while not self._reserve(sequence, sequence.computed + count):
                    preempted = True
                    self._preempt_youngest()
                    if sequence not in self._running:
                        break
                else:
                    chunks.append(_chunk(sequence, count))
                    budget -= count if sequence.remaining > 1 else 0
            position += 1
        if not preempted:
            chunks += self._admit(budget)
        return chunks

    def update_from_output(self, chunk: ScheduledChunk, token: int | None, *, end: bool = False) -> FinishReason | None:
        """Finish reason of the chunk's sequence, or None; records the chunk as computed, and its sampled token.

        A cancelled sequence is not changed.

        Args:
            end: `token` is an end-of-sequence token, which is not part of the output.
        """
        sequence = chunk.sequence
        if sequence not in self._running:
            return None
        sequence.computed = chunk.start + chunk.count
        if not chunk.samples:
            return None
        assert token is not None
        if not end:
            sequence.generated.append(token)
        if not end and len(sequence.generated) < sequence.max_new_tokens:
            return None
        self._running.remove(sequence)
        self._free(sequence)
        return "stop" if end else "length"

    def _admit(self, budget: int) -> list[ScheduledChunk]:
        chunks: list[ScheduledChunk] = []
        while self._waiting and len(self._running) < self._max_running and budget > 0:
            sequence = self._waiting[0]
            # Room for all its tokens and the next one, so that it is not preempted during its prefill.
            wanted = min(sequence.length + 1, self.capacity_tokens)
            if -(-wanted // self.block_tokens) > self._allocator.free - self._reserved_blocks():
                break
            self._waiting.popleft()
            self._running.append(sequence)
            count = min(sequence.remaining, budget)
            reserved = self._reserve(sequence, count)
            assert reserved
            chunks.append(_chunk(sequence, count))
            budget -= count
        return chunks

    def _reserved_blocks(self) -> int:
        """Number of free blocks that running sequences still need for the tokens they have."""
        return sum(max(0, -(-s.length // self.block_tokens) - len(s.blocks)) for s in self._running)

    def _reserve(self, sequence: Sequence, tokens: int) -> bool:
        """Allocate the blocks of a sequence's first `tokens` tokens; False, with none taken, if too few are free."""
        missing = -(-tokens // self.block_tokens) - len(sequence.blocks)
        if missing > self._allocator.free:
            return False
        sequence.blocks += [self._allocator.allocate() for _ in range(missing)]
        return True

    def preempt_all(self) -> None:
        """Free every block: the cache is empty, and running sequences are computed again from their first token."""
        while self._running:
            self._preempt_youngest()

    def _preempt_youngest(self) -> None:
        sequence = self._running.pop()
        self._free(sequence)
        # Older than all waiting sequences: those were never admitted, or were preempted before it and are younger.
        self._waiting.appendleft(sequence)
        self.preemptions += 1

    def _free(self, sequence: Sequence) -> None:
        self._allocator.release(sequence.blocks)
        sequence.blocks = []
        sequence.computed = 0


def _chunk(sequence: Sequence, count: int) -> ScheduledChunk:
    start, samples = sequence.computed, count == sequence.remaining
    return ScheduledChunk(sequence, start, tuple(sequence.tokens(start, count)), tuple(sequence.blocks), samples)
