"""The rules of parallel layouts at their boundaries."""

from __future__ import annotations

import pytest

from cherry.parallel_rules import (
    experts_shard_evenly,
    gathers_tokens,
    keeps_working_copies,
    sequence_divides,
    shards_by_width,
)


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


@pytest.mark.parametrize(
    ("ranks", "precision", "offload", "reshard", "kept"),
    [
        (1, "bf16", False, True, True),
        (1, "fp8", False, True, True),
        (2, "bf16", False, False, True),
        (64, "fp8", False, False, True),
        (2, "bf16", False, True, False),
        (1, "fp32", False, True, False),
        (2, "fp32", False, False, False),
        (1, "bf16", True, True, False),
        (2, "bf16", True, False, False),
    ],
)
def test_half_precision_copies_are_kept_alone_or_where_nothing_is_resharded(
    ranks: int, precision: str, *, offload: bool, reshard: bool, kept: bool
) -> None:
    assert keeps_working_copies(ranks, precision, cpu_offload=offload, reshard=reshard) is kept


def test_tokens_are_gathered_by_up_to_twice_as_many_ranks_as_a_token_has_experts() -> None:
    assert [gathers_tokens(ranks, 2) for ranks in (1, 2, 4, 5)] == [False, True, True, False]
