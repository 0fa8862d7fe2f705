"""Whatever arrives, is cancelled or is preempted: every block has one owner, nobody overtakes, everybody finishes."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anything.engine.scheduler import Scheduler, Sequence
from anything.protocol import UnavailableError

EVENTS = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.integers(1, 40), st.integers(1, 24)),
        st.tuples(st.just("cancel"), st.integers(0, 30), st.just(0)),
        st.tuples(st.just("step"), st.integers(1, 4), st.just(0)),
    ),
    max_size=40,
)
SHAPES = st.tuples(st.integers(16, 40), st.sampled_from([1, 4, 16]), st.integers(1, 5), st.integers(16, 48))


class Run:
    """A scheduler, with every rule checked after every move."""

    def __init__(self, shape: tuple[int, int, int, int]) -> None:
        blocks, self.block_tokens, self.max_running, self.prefill_chunk = shape
        self.blocks = max(blocks, -(-64 // self.block_tokens))
        self.scheduler = Scheduler(
            blocks=self.blocks,
            block_tokens=self.block_tokens,
            max_running=self.max_running,
            prefill_chunk_tokens=self.prefill_chunk,
            max_waiting=1000,
        )
        self.alive: list[Sequence] = []
        self.finished: list[Sequence] = []

    def add(self, prompt: int, new: int) -> None:
        self.alive.append(self.scheduler.add(list(range(prompt)), new))

    def cancel(self, index: int) -> None:
        if self.alive:
            sequence = self.alive.pop(index % len(self.alive))
            assert self.scheduler.cancel(sequence)
            assert not self.scheduler.cancel(sequence)

    def step(self) -> None:
        chunks = self.scheduler.schedule()
        assert bool(chunks) == bool(self.alive)
        self.check()
        orders = [chunk.sequence.order for chunk in chunks]
        assert orders == sorted(set(orders))
        assert len(chunks) <= self.max_running
        assert sum(chunk.count for chunk in chunks if chunk.count > 1) <= self.prefill_chunk
        admitted = [s.order for s in self.alive if s.blocks]
        assert admitted == [s.order for s in self.alive[: len(admitted)]], "a younger one overtook"
        for chunk in chunks:
            assert chunk.start == chunk.sequence.computed
            assert list(chunk.blocks) == chunk.sequence.blocks
            assert len(chunk.blocks) * self.block_tokens >= chunk.start + chunk.count
            known = chunk.sequence.prompt + chunk.sequence.generated
            assert list(chunk.tokens) == known[chunk.start : chunk.start + chunk.count]
            assert chunk.samples == (chunk.start + chunk.count == chunk.sequence.length)
        for chunk in chunks:
            token = 1000 + len(chunk.sequence.generated) if chunk.samples else None
            if self.scheduler.update_from_output(chunk, token) is not None:
                self.alive.remove(chunk.sequence)
                self.finished.append(chunk.sequence)
        self.check()

    def check(self) -> None:
        owned = [block for sequence in self.alive for block in sequence.blocks]
        assert len(owned) == len(set(owned)), "a block has two owners"
        assert len(owned) + self.scheduler.free_blocks == self.blocks, "a block is lost"
        assert self.scheduler.running + self.scheduler.waiting == len(self.alive)


@settings(max_examples=150, deadline=None)
@given(SHAPES, EVENTS)
def test_blocks_have_one_owner_and_everybody_finishes(
    shape: tuple[int, int, int, int], events: list[tuple[str, int, int]]
) -> None:
    run = Run(shape)
    for kind, first, second in events:
        if kind == "add":
            run.add(first, second)
        elif kind == "cancel":
            run.cancel(first)
        else:
            for _ in range(first):
                run.step()
    for _ in range(10_000):
        if not run.alive:
            break
        run.step()
    assert not run.alive
    assert run.scheduler.free_blocks == run.blocks
    for sequence in run.finished:
        # Recomputation after a preemption lost no token and gave none twice.
        assert sequence.generated == [1000 + index for index in range(sequence.max_new_tokens)]


def test_the_youngest_gives_way_and_comes_back_first() -> None:
    run = Run((16, 4, 3, 64))
    for _ in range(3):
        run.add(18, 30)
    run.step()
    for _ in range(200):
        run.step()
        if not run.alive:
            break
    assert run.scheduler.preemptions > 0
    assert [sequence.order for sequence in run.finished] == [0, 1, 2]


def test_a_full_queue_refuses() -> None:
    scheduler = Scheduler(blocks=4, block_tokens=4, max_running=1, prefill_chunk_tokens=4, max_waiting=2)
    scheduler.add([1], 1)
    scheduler.add([1], 1)
    with pytest.raises(UnavailableError) as error:
        scheduler.add([1], 1)
    assert (error.value.status, error.value.retry_after_s) == (429, 1)
    scheduler.schedule()
    scheduler.add([1], 1)


def test_an_end_token_frees_at_once_and_is_no_output() -> None:
    scheduler = Scheduler(blocks=4, block_tokens=4, max_running=1, prefill_chunk_tokens=4, max_waiting=2)
    sequence = scheduler.add([1, 2, 3], 9)
    (chunk,) = scheduler.schedule()
    assert scheduler.update_from_output(chunk, 7) is None
    (chunk,) = scheduler.schedule()
    assert scheduler.update_from_output(chunk, 0, end=True) == "stop"
    assert (sequence.generated, scheduler.free_blocks) == ([7], 4)
