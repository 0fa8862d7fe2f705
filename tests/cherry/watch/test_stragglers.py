"""Stragglers: who is named, after how many reports, under which name, and who no longer is."""

from __future__ import annotations

import json

from cherry.watch.rank_report import RankReport
from cherry.watch.stragglers import STRAGGLERS_FILE, Comparison, Stragglers, read_comparisons


def reports(number: int, *own: float | None, hosts: tuple[str, ...] = ()) -> list[RankReport]:
    """One report of each rank, the job's `number`th, with these times."""
    names = hosts or tuple(f"node{rank}" for rank in range(len(own)))
    return [
        RankReport(rank, len(own), names[rank], 10 * number, 100.0 * number, 1.0, seconds)
        for rank, seconds in enumerate(own)
    ]


def compare(stragglers: Stragglers, number: int, *own: float | None, hosts: tuple[str, ...] = ()) -> Comparison | None:
    return stragglers.compare(reports(number, *own, hosts=hosts), len(own))


def test_a_rank_is_named_with_its_host_once_it_was_slower_three_times_in_a_row(tmp_path):
    stragglers = Stragglers(0.1)
    found = [compare(stragglers, number, 1.0, 1.25, 1.0) for number in range(1, 5)]
    assert [[one.rank for one in comparison.stragglers] for comparison in found] == [[], [], [1], [1]]
    assert [len(comparison.news) for comparison in found] == [0, 0, 1, 0]
    sentence = "straggler: rank 1 on node1 computes 25% longer than the median rank (1.25 s a step against 1 s); "
    assert found[2].news[0].startswith(sentence)
    found[2].append_to(tmp_path)
    line = json.loads((tmp_path / STRAGGLERS_FILE).read_text())
    assert read_comparisons([line, {**line, "slowest": None}, {"stragglers": [7]}]) == [found[2]]
    assert found[2].slowest.excess == 0.25


def test_nobody_is_named_for_noise_or_within_the_share():
    stragglers = Stragglers(0.1)
    for number in range(1, 20):
        slow = 1.5 if number % 3 else 1.0  # twice in a row at most
        comparison = compare(stragglers, number, 1.0, slow, 1.08)
        assert comparison.stragglers == () and comparison.news == ()


def test_nobody_is_named_where_all_vary_more_than_one_is_slower():
    stragglers = Stragglers(0.1)
    for number in range(1, 20):
        load = 1.0 + number % 2
        assert compare(stragglers, number, load, 1.5 * load).stragglers == ()


def test_a_rank_that_keeps_up_again_is_no_longer_named():
    stragglers = Stragglers(0.1)
    for number in range(1, 4):
        compare(stragglers, number, 1.0, 2.0)
    for number in range(4, 6):  # now and then it keeps up
        assert compare(stragglers, number, 1.0, 1.0).news == ()
    assert [one.rank for one in compare(stragglers, 6, 1.0, 2.0).stragglers] == [1]
    for number in range(7, 9):
        assert compare(stragglers, number, 1.0, 1.0).news == ()
    assert compare(stragglers, 9, 1.0, 1.0).news == ("rank 1 on node1 is no longer a straggler",)


def test_a_host_whose_ranks_are_all_slow_is_named_as_a_whole():
    stragglers = Stragglers(0.1)
    hosts = ("node1",) * 4 + ("node2",) * 2
    for number in range(1, 4):
        comparison = compare(stragglers, number, *[1.0] * 4, 1.3, 1.2, hosts=hosts)
    assert [one.rank for one in comparison.stragglers] == [4, 5]
    (sentence,) = comparison.news
    assert sentence.startswith("stragglers: all 2 ranks on node2 compute at least 20% longer")


def test_ranks_are_compared_once_each_has_a_new_report_and_only_where_all_measure():
    stragglers = Stragglers(0.1)
    assert compare(stragglers, 1, 1.0, None) is None
    assert compare(stragglers, 1, 1.0, 2.0) is not None
    late = [reports(2, 1.0, 2.0)[0], reports(1, 1.0, 2.0)[1]]
    assert stragglers.compare(late, 2) is None
    assert stragglers.compare(late[:1], 2) is None
