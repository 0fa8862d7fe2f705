"""Gathered tokens and summed outputs equal the experts on one rank: under skew, recomputed, and with nothing to do."""

from __future__ import annotations

from collections.abc import Callable

import pytest


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3])
def test_outputs_and_gradients_equal_those_of_one_rank(check_dispatch: Callable[..., None], ranks: int) -> None:
    check_dispatch(ranks=ranks, on_node="gather")
