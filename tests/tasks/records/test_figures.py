"""Names of figures in the tracker: groups, one name a figure, and nothing that is constant among the charts."""

from __future__ import annotations

import pytest

from cherry.train_record import SERIES
from tasks.records.figures import (
    COLUMNS,
    CONSTANTS,
    FIGURES,
    GROUPS,
    HEADLINE,
    cost_of,
    difference_of,
    seconds_of,
    tracked,
)


def test_figures_are_in_groups_and_constants_are_tags() -> None:
    figures = {"heldout_bits_per_byte": 2.5, "documents": 1234567, "loss_last": 3.0, "zlib_bits_per_byte": 2.0}
    found = tracked({**figures, "verdict": "better", "champion": True, "new": 1}, "evaluate")
    assert found.metrics == {HEADLINE: 2.5, "evaluate/new": 1.0}
    assert found.tags == {"documents": "1234567", "zlib_bits_per_byte": "2"}


def test_every_group_has_its_place_on_the_page() -> None:
    names = [*FIGURES.values(), *SERIES.values(), seconds_of("data"), cost_of("EUR")]
    assert {name.partition("/")[0] for name in names} == set(GROUPS)
    assert GROUPS[0] == HEADLINE.partition("/")[0]
    shown = [column.split("`")[1] for column in COLUMNS if column.startswith("metrics")]
    assert set(shown) <= set(names) | {seconds_of("train")}


def test_no_figure_has_the_name_of_a_series_or_is_a_constant_too() -> None:
    assert not set(FIGURES.values()) & set(SERIES.values())
    assert not set(FIGURES) & CONSTANTS


@pytest.mark.parametrize(
    ("baseline", "name"),
    [("untrained", "vs_untrained/low"), ("net v1", "vs_net v1/low"), ("a+b v2", "vs_a_b v2/low")],
)
def test_differences_from_two_baselines_are_two_charts(baseline: str, name: str) -> None:
    assert difference_of(baseline, "low") == name
