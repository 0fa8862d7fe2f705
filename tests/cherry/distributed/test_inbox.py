"""Gradients that are larger than an inbox travel in several, whole and without overlap."""

from __future__ import annotations

import pytest

from cherry.distributed.inbox import pieces_of


@pytest.mark.parametrize("sizes", [[1], [1000, 3, 129], [128, 128, 5000], [256] * 9, []])
@pytest.mark.parametrize("room", [128, 256, 1024, 1 << 20])
def test_pieces_cover_every_value_once_and_fit_into_an_inbox(sizes: list[int], room: int) -> None:
    covered = [0] * len(sizes)
    for pieces in pieces_of(sizes, room):
        end = 0
        for index, first, values, at in pieces:
            assert first == covered[index], "in order, without a gap"
            covered[index] += values
            assert at >= end and at % 128 == 0 and at + values <= room
            end = at + values
    assert covered == sizes
