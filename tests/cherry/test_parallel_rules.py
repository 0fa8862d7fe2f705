"""The rules of parallel layouts at their boundaries."""

from __future__ import annotations

import pytest

from cherry.parallel_rules import experts_shard_evenly, keeps_working_copies, sequence_divides, shards_by_width


@pytest.mark.parametrize(
    ("experts", "widths", "ranks", "even"),
    [(8, (7, 7), 4, True), (2, (8, 16), 4, True), (2, (8, 6), 4, False), (4, (7, 7), 4, True), (3, (7, 7), 1, True)],
)
def test_experts_shard_by_expert_or_by_both_widths(
    experts: int, widths: tuple[int, ...], ranks: int, even: bool
) -> None:
    assert experts_shard_evenly(experts, widths, ranks) is even


def test_a_block_pads_its_experts_until_there_are_more_ranks_and_an_own_unit_never() -> None:
    assert not shards_by_width(8, 64, 8, expert_parallel=False)
    assert not shards_by_width(9, 64, 8, expert_parallel=False)
    assert shards_by_width(7, 64, 8, expert_parallel=False)
    assert shards_by_width(9, 64, 8, expert_parallel=True)
    assert not shards_by_width(16, 64, 8, expert_parallel=True)
    assert not shards_by_width(7, 60, 8, expert_parallel=True), "the width does not divide either"


def test_a_context_rank_takes_two_chunks() -> None:
    assert [sequence_divides(12, context) for context in (1, 2, 3, 4)] == [True, True, True, False]
    assert sequence_divides(7, 1)


def test_one_half_precision_rank_keeps_its_copies() -> None:
    assert keeps_working_copies(1, "bf16", cpu_offload=False)
    assert keeps_working_copies(1, "fp8", cpu_offload=False)
    for ranks, precision, offload in ((2, "bf16", False), (1, "fp32", False), (1, "bf16", True)):
        assert not keeps_working_copies(ranks, precision, cpu_offload=offload)
