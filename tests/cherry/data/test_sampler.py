"""The order of training: every sequence once an epoch, the same for any number of ranks, known from the position."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cherry.data.sampler import Sampler, permuted


@settings(max_examples=60, deadline=None)
@given(length=st.integers(1, 700), seed=st.integers(0, 2**32), epoch=st.integers(0, 1000))
def test_an_epoch_is_a_permutation_and_any_place_of_it_is_found_alone(length: int, seed: int, epoch: int) -> None:
    whole = permuted(np.arange(length), length, seed=seed, epoch=epoch)
    assert sorted(whole) == list(range(length))
    place = seed % length
    assert permuted(np.array([place]), length, seed=seed, epoch=epoch).tolist() == [whole[place]]


def test_a_long_epoch_needs_no_more_than_a_short_one() -> None:
    """A trillion sequences: an order that had to be drawn whole would not fit in memory."""
    length = 10**12
    found = permuted(np.arange(5000), length, seed=0, epoch=0)
    assert len(set(found.tolist())) == 5000
    assert 0 <= found.min() < found.max() < length
    # The mean of 5,000 uniform numbers is within 4 standard errors (0.289 / sqrt(5000) each) of the middle.
    assert abs(found.mean() / length - 0.5) < 4 * 0.289 / np.sqrt(5000)


@pytest.mark.parametrize("length", [5, 64, 100])
def test_every_sequence_comes_to_every_place_equally_often(length: int) -> None:
    epochs = 1500
    counts = np.zeros((length, length))
    for epoch in range(epochs):
        counts[np.arange(length), permuted(np.arange(length), length, seed=1, epoch=epoch)] += 1
    expected = epochs / length
    statistic = float(((counts - expected) ** 2 / expected).sum())
    freedom = (length - 1) ** 2
    assert abs(statistic - freedom) < 5 * np.sqrt(2 * freedom)


def test_neighbours_in_the_order_are_strangers() -> None:
    order = permuted(np.arange(20_000), 20_000, seed=3, epoch=0)
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.03
    assert abs(np.corrcoef(order, np.arange(20_000))[0, 1]) < 0.03
    assert (np.diff(order) == 1).sum() < 10


@settings(max_examples=60, deadline=None)
@given(length=st.integers(1, 50), batch=st.integers(1, 24), ranks=st.integers(1, 30), step=st.integers(0, 60))
def test_the_global_order_is_the_same_for_any_number_of_ranks(length: int, batch: int, ranks: int, step: int) -> None:
    sampler = Sampler(length, 7, batch)
    whole = sampler.indices(step * batch)
    assert len(whole) == batch
    parts = [sampler.indices(step * batch, rank, ranks) for rank in range(ranks)]
    woven = np.full(batch, -1)
    for rank, part in enumerate(parts):
        woven[rank::ranks] = part
    assert woven.tolist() == whole.tolist()
    assert [len(part) for part in parts[batch:]] == [0] * max(0, ranks - batch)


def test_a_batch_spans_two_epochs_and_no_sequence_is_left_out() -> None:
    sampler = Sampler(length=10, seed=0, batch_size=4)
    read = np.concatenate([sampler.indices(4 * step) for step in range(10)])
    for epoch in range(4):
        assert sorted(read[10 * epoch : 10 * epoch + 10]) == list(range(10))
    assert read[:10].tolist() != read[10:20].tolist()


def test_the_order_goes_on_where_it_was_when_the_size_of_a_batch_changes() -> None:
    whole = Sampler(length=50, seed=3, batch_size=60).indices(0).tolist()
    batches = ((0, 4), (4, 16), (20, 7), (27, 33))
    read = np.concatenate([Sampler(50, 3, size).indices(position) for position, size in batches])
    assert read.tolist() == whole


def test_a_batch_longer_than_an_epoch_reads_it_again_and_again() -> None:
    read = Sampler(length=3, seed=0, batch_size=8).indices(0)
    assert sorted(read[:3]) == sorted(read[3:6]) == [0, 1, 2]
    assert len(set(read[6:])) == 2


def test_the_order_is_the_seed_s_and_stays_so() -> None:
    """A run that is resumed by a later version, of this or of numpy, must read the same order: known values."""
    assert Sampler(1000, 0, 6).indices(18).tolist() != Sampler(1000, 1, 6).indices(18).tolist()
    assert Sampler(1000, 0, 6).indices(0).tolist() == [760, 103, 334, 44, 350, 35]
