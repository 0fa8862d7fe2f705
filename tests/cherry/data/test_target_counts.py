"""Counts of loss-bearing targets: those of the collated tensors, from the file and without it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from base.errors import DataError
from cherry.data.collate import micro_batch, mtp_targets
from cherry.data.prepare import prepare
from cherry.data.shards import TokenDataset
from cherry.data.target_counts import FILE_NAME, TargetCounts, write_target_counts
from cherry.job_config import DataConfig
from cherry.loss import IGNORE_INDEX

LENGTH = 16


@pytest.fixture(scope="module", params=["text", "chat"])
def prepared(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Short documents, so that most sequences hold a boundary; in several shards."""
    root = tmp_path_factory.mktemp(request.param)
    lines = []
    for number in range(80):
        turns = [" ".join(f"w{number * k % 7}" for k in range(1, 3 + number % 5)) for _ in range(2)]
        record = {"text": turns[0]}
        if request.param == "chat":
            roles = ("user", "assistant")
            record = {"messages": [{"role": r, "content": t} for r, t in zip(roles, turns, strict=True)]}
        lines.append(json.dumps(record))
    (root / "documents.jsonl").write_text("\n".join(lines))
    form = "chat" if request.param == "chat" else "jsonl"
    config = DataConfig(source=str(root), format=form, sequence_length=LENGTH, heldout_fraction=0.2)
    prepare(config, vocab_size=600, directory=str(root / "data"), shard_tokens=100)
    return root / "data"


def collated(dataset: TokenDataset, *, keep_apart: bool) -> NDArray[np.int64]:
    """Counts of each sequence by its tensors [S, 2]."""
    rows = []
    for index in range(len(dataset)):
        batch = micro_batch(dataset, [index], keep_apart=keep_apart)
        further_BT = mtp_targets(batch.targets_BT, batch.documents)
        rows.append([int((x != IGNORE_INDEX).sum()) for x in (batch.targets_BT, further_BT)])
    return np.array(rows)


@pytest.mark.parametrize("keep_apart", [False, True])
@pytest.mark.parametrize("with_file", [False, True])
def test_counts_are_those_of_the_collated_targets(
    prepared: Path, tmp_path: Path, keep_apart: bool, with_file: bool
) -> None:
    dataset = TokenDataset(str(prepared))
    counts = TargetCounts(dataset, prepared if with_file else tmp_path, keep_apart=keep_apart)
    expected = collated(dataset, keep_apart=keep_apart)
    assert len(dataset.manifest.shards) > 2 and len(dataset) > 20
    everything = (keep_apart, dataset.manifest.masked) == (False, False)
    assert (expected[:, 0].min() == LENGTH) == everything, "or the corpus proves nothing"
    for index in range(len(dataset)):
        assert counts.of(np.array([index])) == tuple(expected[index])
    chosen = np.random.default_rng(0).integers(0, len(dataset), 50)
    assert counts.of(chosen) == tuple(expected[chosen].sum(axis=0))


def test_a_file_that_is_written_in_pieces_is_the_same(prepared: Path, tmp_path: Path) -> None:
    write_target_counts(TokenDataset(str(prepared)), tmp_path, chunk_tokens=5 * LENGTH)
    assert (tmp_path / FILE_NAME).read_bytes() == (prepared / FILE_NAME).read_bytes()


@pytest.mark.parametrize(
    ("content", "rule"),
    [
        (np.zeros((3, 2, 2), dtype=np.int32), r"must hold int32 of shape \(\d+, 2, 2\), got int32 of \(3, 2, 2\)"),
        (b"\x93NUMPY cut off", "not an array"),
    ],
)
def test_a_file_of_other_data_is_refused(prepared: Path, tmp_path: Path, content: object, rule: str) -> None:
    path = tmp_path / FILE_NAME
    np.save(path, content) if isinstance(content, np.ndarray) else path.write_bytes(content)  # type: ignore[arg-type]
    with pytest.raises(DataError, match=rf"{path}: {rule}.*prepare again"):
        TargetCounts(TokenDataset(str(prepared)), tmp_path, keep_apart=True)
