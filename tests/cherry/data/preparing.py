"""Prepared data of the tests, and its tokens read back."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from cherry.data.prepare import prepare
from cherry.data.shards import SHARD_TOKENS, Manifest, TokenDataset
from cherry.job_config import DataConfig

VOCAB = 600


def make(
    source: object, directory: object, *, shard_tokens: int = SHARD_TOKENS, vocab: int = VOCAB, **options: Any
) -> Manifest:
    config = DataConfig.model_validate(
        {"source": str(source), "sequence_length": 16, "heldout_fraction": 0.2, **options}
    )
    return prepare(config, vocab_size=vocab, directory=str(directory), shard_tokens=shard_tokens)


def stream(directory: object) -> list[int]:
    """All tokens, read through the sequences."""
    dataset = TokenDataset(str(directory))
    rows = [dataset.sequence(i)[0] for i in range(len(dataset))]
    for row, following in pairwise(rows):
        assert row[-1] == following[0]
    return [int(token) for row in rows for token in row[:-1]] + [int(rows[-1][-1])]
