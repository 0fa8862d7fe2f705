"""Buckets of matrices: consecutive, complete, and no larger than the limit but for single larger matrices."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cherry.optim.muon_buckets import fill_buckets


@pytest.mark.parametrize(
    ("sizes", "buckets"),
    [
        ([], []),
        ([4, 6], [(0, 2)]),  # exactly the limit
        ([4, 7], [(0, 1), (1, 2)]),
        ([30], [(0, 1)]),  # one that is larger is a bucket of its own
        ([1, 30, 1, 1], [(0, 1), (1, 2), (2, 4)]),
    ],
)
def test_a_bucket_ends_before_the_limit_is_exceeded(sizes: list[int], buckets: list[tuple[int, int]]) -> None:
    assert [(bucket.start, bucket.stop) for bucket in fill_buckets(sizes, 10)] == buckets


@given(sizes=st.lists(st.integers(0, 30)), limit=st.integers(1, 40))
def test_every_matrix_is_in_one_bucket_and_no_bucket_could_take_the_next(sizes: list[int], limit: int) -> None:
    buckets = list(fill_buckets(sizes, limit))
    assert [index for bucket in buckets for index in range(bucket.start, bucket.stop)] == list(range(len(sizes)))
    for bucket in buckets:
        assert bucket.stop - bucket.start == 1 or sum(sizes[bucket]) <= limit
        assert bucket.stop == len(sizes) or sum(sizes[bucket]) + sizes[bucket.stop] > limit
