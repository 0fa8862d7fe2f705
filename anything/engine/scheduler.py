"""Owns which tokens of which sequences are computed in the next step, and which cache blocks hold them.

It knows nothing of tensors, threads or time: the engine asks it for a step, computes it, and reports the new tokens.

Iteration-level scheduling as in Orca (OSDI 2022), blocks and preemption by recomputation as in PagedAttention
(arXiv 2309.06180, section 4.5).
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from anything.protocol import FinishReason, UnavailableError

# Seconds a refused caller is asked to wait: about one generation of the embedded default.
_RETRY_AFTER_S = 1


@dataclass(eq=False)
class Sequence:
    """One generation as the scheduler sees it. `order` grows with arrival."""

    sequence_id: int
    order: int
    prompt: list[int]
    max_new_tokens: int
    generated: list[int] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)
    computed: int = 0
    """Tokens whose latents are in the cache."""

    def __post_init__(self) -> None:
        assert self.prompt and self.max_new_tokens > 0

    @property
    def length(self) -> int:
        """Tokens known so far, prompt and generated."""
        return len(self.prompt) + len(self.generated)

    @property
    def remaining(self) -> int:
        """Known tokens that are not in the cache yet; 1 while decoding."""
        return self.length - self.computed

    def tokens(self, start: int, count: int) -> list[int]:
        """`count` known tokens from position `start`."""
        known = len(self.prompt)
        if start >= known:
            return self.generated[start - known : start - known + count]
        return (self.prompt[start:] + self.generated[: max(0, start + count - known)])[:count]


@dataclass(frozen=True)
class Row:
    """Tokens [start, start + count) of one sequence, to be computed in a step.

    A copy: the sequence may be cancelled, and so lose its blocks, while the step runs. What is then written to them
    is harmless, for they get another owner only in a later step.
    """

    sequence: Sequence
    start: int
    tokens: tuple[int, ...]
    blocks: tuple[int, ...]
    samples: bool
    """Whether these are the last known tokens, so that the step gives a new one."""

    @property
    def count(self) -> int:
        """Tokens of this row."""
        return len(self.tokens)


class BlockAllocator:
    """Hands out cache blocks by number. Each is free or owned once."""

    def __init__(self, blocks: int) -> None:
        self.blocks = blocks
        self._free = deque(range(blocks))
        self._owned: set[int] = set()

    @property
    def free(self) -> int:
        """Blocks that nobody owns."""
        return len(self._free)

    def allocate(self) -> int:
        """Take a free block; the caller has checked that there is one."""
        block = self._free.popleft()
        self._owned.add(block)
        return block

    def release(self, blocks: list[int]) -> None:
        """Give blocks back. Giving back what is not owned is a bug of ours."""
        for block in blocks:
            assert block in self._owned, f"block {block} is released twice"
            self._owned.remove(block)
            self._free.append(block)


class Scheduler:
    """First come, first served: no sequence is admitted before an older one, and the youngest gives way.

    Every sequence finishes: the oldest one always gets the blocks it needs, and `capacity_tokens` is what one
    sequence alone may fill.
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
        """Tokens that the whole cache holds."""
        return self._allocator.blocks * self.block_tokens

    @property
    def free_blocks(self) -> int:
        """Blocks that no sequence owns."""
        return self._allocator.free

    @property
    def waiting(self) -> int:
        """Sequences that own no block."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Sequences that are admitted."""
        return len(self._running)

    def add(self, prompt: list[int], max_new_tokens: int) -> Sequence:
        """Queue a sequence whose prompt and output fit `capacity_tokens`.

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
        sequence = Sequence(self._next_order, self._next_order, prompt, max_new_tokens)
        self._next_order += 1
        self._waiting.append(sequence)
        return sequence

    def cancel(self, sequence: Sequence) -> bool:
        """Drop a sequence and free its blocks. False when it had finished or was dropped before."""
        if sequence in self._running:
            self._running.remove(sequence)
        elif sequence in self._waiting:
            self._waiting.remove(sequence)
        else:
            return False
        self._free(sequence)
        return True

    def schedule(self) -> list[Row]:
        """The rows of the next step, oldest sequence first; empty when there is nothing to do.

        Sequences that decode take one row of one token each; prompts share prefill_chunk_tokens a step.
        """
        rows: list[Row] = []
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
                    rows.append(_row(sequence, count))
                    budget -= count if sequence.remaining > 1 else 0
            position += 1
        if not preempted:
            rows += self._admit(budget)
        return rows

    def report(self, row: Row, token: int | None, *, end: bool = False) -> FinishReason | None:
        """Record that a row was computed, and the token that it gave.

        Args:
            end: `token` ends the sequence (an end-of-sequence token, which is not part of the output).

        Returns:
            Why the sequence is finished, or None. A cancelled sequence is left alone.
        """
        sequence = row.sequence
        if sequence not in self._running:
            return None
        sequence.computed = row.start + row.count
        if not row.samples:
            return None
        assert token is not None
        if not end:
            sequence.generated.append(token)
        if not end and len(sequence.generated) < sequence.max_new_tokens:
            return None
        self._running.remove(sequence)
        self._free(sequence)
        return "stop" if end else "length"

    def holds(self, sequence: Sequence) -> bool:
        """Whether the sequence is neither finished nor cancelled."""
        return sequence in self._running or sequence in self._waiting

    def _admit(self, budget: int) -> list[Row]:
        rows: list[Row] = []
        while self._waiting and len(self._running) < self._max_running and budget > 0:
            sequence = self._waiting[0]
            # Room for all known tokens and the next one, so that it is not preempted while still being read in.
            wanted = min(sequence.length + 1, self.capacity_tokens)
            if -(-wanted // self.block_tokens) > self._allocator.free - self._promised():
                break
            self._waiting.popleft()
            self._running.append(sequence)
            count = min(sequence.remaining, budget)
            reserved = self._reserve(sequence, count)
            assert reserved
            rows.append(_row(sequence, count))
            budget -= count
        return rows

    def _promised(self) -> int:
        """Blocks that running sequences still need for tokens they have."""
        return sum(max(0, -(-s.length // self.block_tokens) - len(s.blocks)) for s in self._running)

    def _reserve(self, sequence: Sequence, tokens: int) -> bool:
        """Give a sequence the blocks for its first `tokens` tokens; False (and nothing taken) when too few are free."""
        missing = -(-tokens // self.block_tokens) - len(sequence.blocks)
        if missing > self._allocator.free:
            return False
        sequence.blocks += [self._allocator.allocate() for _ in range(missing)]
        return True

    def _preempt_youngest(self) -> None:
        sequence = self._running.pop()
        self._free(sequence)
        # Older than all that wait: whoever waits was never admitted, or was preempted before it and is younger.
        self._waiting.appendleft(sequence)
        self.preemptions += 1

    def _free(self, sequence: Sequence) -> None:
        self._allocator.release(sequence.blocks)
        sequence.blocks = []
        sequence.computed = 0


def _row(sequence: Sequence, count: int) -> Row:
    start, samples = sequence.computed, count == sequence.remaining
    return Row(sequence, start, tuple(sequence.tokens(start, count)), tuple(sequence.blocks), samples)
