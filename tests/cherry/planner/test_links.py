"""Time of collectives against bytes over the rate of the narrowest link."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cherry.planner.links import all_reduce_seconds, all_to_all_seconds, even_all_to_all_seconds, ring_seconds
from tests.cherry.planner.workloads import released


def test_collectives_take_the_time_of_their_narrowest_link() -> None:
    work = released()
    size = 64e9
    ring = ring_seconds(work, work.dense_group, size)
    # Eight adapters of a node carry a ring together: 8 x 50e9 x 0.8, which is below NVLink's 450e9 x 0.8.
    assert ring == pytest.approx(size * 255 / 256 / 320e9, rel=0.02)
    alone = ring_seconds(work, work.expert_shard_group, size)
    assert alone == pytest.approx(size * 3 / 4 / 40e9, rel=0.01)
    # Rows of 8 choices for 4,096 tokens, 56 of 64 to other nodes; once a node, a token leaves for 3.6 of 8 of them.
    inside, across = all_to_all_seconds(work, 2 * 7168)
    assert inside + across == pytest.approx(8 * 4096 * 14336 * 56 / 64 / 35e9, rel=0.01)
    away = 4 * (1 - 0.75**8) * 4096 * 14336 * 7 / 8
    once = replace(work, expert_ranks_per_node=8)
    inside, across = all_to_all_seconds(once, 2 * 7168)
    assert across == pytest.approx(away / 35e9, rel=0.01)
    assert inside == pytest.approx(8 * 4096 * 14336 * 7 / 8 / 360e9, rel=0.01)
    # Kernels that do both at a time hide one behind the other.
    assert sum(all_to_all_seconds(replace(once, fused_all_to_all=True), 2 * 7168)) == pytest.approx(
        away / 45e9, rel=0.01
    )


def test_a_group_of_one_rank_and_nothing_to_send_take_no_time() -> None:
    work = released()
    alone = replace(work, expert=1)
    assert ring_seconds(alone, alone.expert_group, 1e9) == ring_seconds(work, work.expert_group, 0) == 0
    assert even_all_to_all_seconds(alone, alone.expert_group, 1e9) == 0
    assert all_to_all_seconds(alone, 1e4) == (0.0, 0.0)


def test_an_all_reduce_is_a_reduce_scatter_and_an_all_gather() -> None:
    work = released()
    assert all_reduce_seconds(work, work.dense_group, 1e9) == 2 * ring_seconds(work, work.dense_group, 1e9)


def test_an_even_all_to_all_takes_the_slower_of_node_and_network() -> None:
    work = released()
    group, size = work.expert_group, 64e9
    assert (group.ranks, group.on_node) == (64, 8)
    # 56 of 64 parts leave the node, over this rank's own adapter of 50e9 x 0.7.
    assert even_all_to_all_seconds(work, group, size) == pytest.approx(size * 56 / 64 / 35e9, rel=0.01)
    inside = replace(work, expert=8)
    assert even_all_to_all_seconds(inside, inside.expert_group, size) == pytest.approx(size * 7 / 8 / 360e9, rel=0.01)


def test_ranks_of_one_node_gather_tokens_whatever_the_imbalance() -> None:
    work = replace(released(), expert=8)  # a token has 8 experts
    expected = 4096 * 14336 * 7 / 360e9, 0.0
    assert all_to_all_seconds(work, 2 * 7168) == pytest.approx(expected, rel=0.02)
    assert all_to_all_seconds(replace(work, assumed_imbalance=3.0), 2 * 7168) == pytest.approx(expected, rel=0.02)
    assert not replace(work, expert=16).gathers_tokens, "they are on two nodes"
