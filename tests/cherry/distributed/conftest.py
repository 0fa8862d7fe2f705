"""Fixture of the distributed tests: all-to-all dispatch and combine between ranks, checked by each of them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("expert_parallel_rows.py")


@pytest.fixture
def check_dispatch(tmp_path: Path, run_together: Callable[[list[list[str]]], None]) -> Callable[..., None]:
    """Runs the check of expert_parallel_rows.py on so many ranks and ranks per node, or with `gather`."""

    def check(*, ranks: int, on_node: int | str) -> None:
        each = [sys.executable, str(PROGRAM), str(tmp_path / "store")]
        run_together([[*each, str(rank), str(ranks), str(on_node)] for rank in range(ranks)])

    return check
