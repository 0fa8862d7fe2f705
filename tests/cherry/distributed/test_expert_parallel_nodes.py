"""Hierarchical dispatch over several nodes equals the experts on one rank, and sends a token to each node once."""

from __future__ import annotations

from collections.abc import Callable

import pytest

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(("ranks", "on_node"), [(4, 2), (3, 1)])
def test_outputs_and_gradients_over_nodes_equal_those_of_one_rank(
    check_dispatch: Callable[..., None], ranks: int, on_node: int
) -> None:
    check_dispatch(ranks=ranks, on_node=on_node)
