"""Reading ahead: the batches of the positions asked for, on a thread that ends, with the errors of the right batch."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from base.errors import DataError
from cherry.data.batches import BatchReader, StepBatch
from cherry.data.sampler import Sampler
from cherry.data.shards import TokenDataset
from cherry.data.target_counts import TargetCounts

SIZE = 8
Make = Callable[..., BatchReader]


@pytest.fixture
def make(prepared_data: Path) -> Iterator[Make]:
    """Makes readers of batches of 8 on the CPU."""
    made: list[BatchReader] = []

    def build(*, rank: int = 0, ranks: int = 1, kind: type[TokenDataset] = TokenDataset, **changes: Any) -> BatchReader:
        dataset = kind(str(prepared_data))
        options = {"micro_batches": 2, "keep_apart": True, "device": torch.device("cpu"), **changes}
        counts = TargetCounts(dataset, prepared_data, keep_apart=options["keep_apart"])
        sampler = Sampler(len(dataset), 3, SIZE)
        made.append(BatchReader(dataset, sampler, counts, data_rank=rank, data_ranks=ranks, **options))
        return made[-1]

    yield build
    for reader in made:
        reader.close()


def rows(batch: StepBatch) -> list[list[int]]:
    return [row.tolist() for part in batch.micro_batches for row in part.tokens_BT]


def same(left: StepBatch, right: StepBatch) -> bool:
    return rows(left) == rows(right) and (left.targets, left.mtp_targets) == (right.targets, right.mtp_targets)


def test_batches_are_those_of_their_positions_over_jumps_too(make: Make) -> None:
    reader, plain = make(), make()
    positions = [0, 8, 16, 24, 100, 108, 116, 8, 16, 3, 11]  # on, a jump ahead, back, to none that was begun
    for position in positions:
        assert same(reader.take(position), plain.read(position)), position
    assert len({str(rows(plain.read(position))) for position in positions}) == len(set(positions))


@pytest.mark.parametrize("keep_apart", [False, True])
def test_ranks_share_a_batch_and_know_the_counts_of_all(make: Make, keep_apart: bool) -> None:
    whole = make(keep_apart=keep_apart, micro_batches=1).read(40)
    shares = [make(rank=rank, ranks=4, keep_apart=keep_apart).read(40) for rank in range(4)]
    woven = [row for turn in zip(*map(rows, shares), strict=True) for row in turn]
    assert woven == rows(whole)
    assert {(share.targets, share.mtp_targets) for share in shares} == {(whole.targets, whole.mtp_targets)}
    valid = int((whole.micro_batches[0].targets_BT != -100).sum())
    assert whole.targets == valid > whole.mtp_targets > 0
    assert [len(share.micro_batches) for share in shares] == [2] * 4


class Watched(TokenDataset):
    """Says when each sequence is read, and by which thread; some cannot be read."""

    def __init__(self, directory: str) -> None:
        super().__init__(directory)
        self.threads: dict[int, str] = {}
        self.changed = threading.Condition()
        self.broken: set[int] = set()

    def sequence(self, index: int) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        with self.changed:
            self.threads[index] = threading.current_thread().name
            self.changed.notify_all()
        if index in self.broken:
            raise DataError(f"sequence {index} cannot be read")
        return super().sequence(index)


def test_the_next_two_batches_are_read_by_the_thread_before_they_are_asked_for(make: Make) -> None:
    reader = make(kind=Watched)
    dataset = reader._dataset
    assert isinstance(dataset, Watched)
    reader.take(0)
    ahead = {int(index) for position in (0, 8, 16) for index in Sampler(len(dataset), 3, SIZE).indices(position)}
    with dataset.changed:
        dataset.changed.wait_for(lambda: ahead <= dataset.threads.keys())
    reader.close()
    assert dataset.threads.keys() == ahead, "and no more than that"
    assert all(name.startswith("batches") for name in dataset.threads.values())
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("batches")]


def test_an_error_is_raised_by_the_batch_that_it_is_of_and_the_ones_before_are_whole(make: Make) -> None:
    reader = make(kind=Watched)
    dataset = reader._dataset
    assert isinstance(dataset, Watched)
    wrong = int(Sampler(len(dataset), 3, SIZE).indices(16)[5])
    dataset.broken = {wrong}
    for position in (0, 8):
        assert len(rows(reader.take(position))) == SIZE
    with pytest.raises(DataError, match=f"sequence {wrong} cannot be read"):
        reader.take(16)
    dataset.broken = set()
    assert same(reader.take(16), make().read(16)), "a batch that failed may be asked for again"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU and finds none")
def test_what_a_gpu_reads_is_pinned_and_arrives_unchanged(make: Make) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    reader, plain = make(device=device), make()
    for position in (0, 8):
        for batch, expected in zip(
            reader.take(position).micro_batches, plain.read(position).micro_batches, strict=True
        ):
            assert batch.documents is not None and expected.documents is not None
            assert all(x.is_pinned() for x in (batch.tokens_BT, batch.targets_BT, batch.documents.boundaries_S))
            moved = batch.to(device)
            assert moved.documents is not None and moved.tokens_BT.device == device
            assert torch.equal(moved.tokens_BT.cpu(), expected.tokens_BT)
            assert torch.equal(moved.targets_BT.cpu(), expected.targets_BT)
            assert torch.equal(moved.documents.boundaries_S.cpu(), expected.documents.boundaries_S)
