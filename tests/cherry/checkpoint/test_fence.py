"""Fence of a run directory: the newest attempt goes on, every older one is stopped."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from base.errors import SupersededError
from cherry.checkpoint.fence import Fence


def test_the_second_attempt_stops_the_first_and_is_not_stopped_by_it(tmp_path: Path) -> None:
    first = Fence(str(tmp_path / "train"))
    first.check()
    second = Fence(str(tmp_path / "train"))
    second.check()
    with pytest.raises(SupersededError, match="attempt 2 took over from attempt 1"):
        first.check()
    second.check()


def test_of_attempts_that_start_together_exactly_one_goes_on(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        fences = list(pool.map(lambda _: Fence(str(tmp_path)), range(24)))
    assert sorted(fence.epoch for fence in fences) == list(range(1, 25))

    def alive(fence: Fence) -> bool:
        try:
            fence.check()
        except SupersededError:
            return False
        return True

    assert [fence.epoch for fence in fences if alive(fence)] == [24]
