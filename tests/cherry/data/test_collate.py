"""Collation of sequences to micro-batches: tokens, targets of the head and of the MTP module, and documents."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from base.errors import ConfigError
from cherry.data.collate import check_fits, micro_batch, mtp_targets
from cherry.data.shards import TokenDataset, read_manifest
from cherry.job_config import JobConfig
from cherry.loss import IGNORE_INDEX


def test_the_mtp_module_predicts_one_token_further() -> None:
    targets_BT = torch.tensor([[5, 6, IGNORE_INDEX, 8], [1, 2, 3, 4]])
    expected_BT = torch.tensor([[6, IGNORE_INDEX, 8, IGNORE_INDEX], [2, 3, 4, IGNORE_INDEX]])
    assert mtp_targets(targets_BT).equal(expected_BT)


def test_targets_are_the_next_tokens_of_the_sequence(prepared_data: Path) -> None:
    dataset = TokenDataset(str(prepared_data))
    batch = micro_batch(dataset, [3, 0], keep_apart=False)
    assert batch.documents is None
    for row, index in enumerate((3, 0)):
        tokens = torch.from_numpy(dataset.sequence(index)[0])
        assert batch.tokens_BT[row].equal(tokens[:-1])
        assert batch.targets_BT[row].equal(tokens[1:])


def test_with_documents_apart_no_target_lies_in_the_next_document(prepared_data: Path) -> None:
    dataset = TokenDataset(str(prepared_data))
    bos_id = dataset.manifest.bos_id
    tokens_SX, _ = dataset.sequences(0, len(dataset))
    # Some sequences have a boundary inside.
    chosen = [index for index, row in enumerate(tokens_SX) if bos_id in row[1:-1]][:4]
    assert len(chosen) == 4
    batch = micro_batch(dataset, chosen, keep_apart=True)
    assert batch.documents is not None
    further_BT = mtp_targets(batch.targets_BT, batch.documents)
    for row, index in enumerate(chosen):
        tokens = [int(token) for token in tokens_SX[index]]
        for place in range(len(tokens) - 1):
            following = tokens[place + 1 : place + 3]
            own = following[: following.index(bos_id)] if bos_id in following else following
            assert int(batch.targets_BT[row, place]) == (own[0] if own else IGNORE_INDEX), (index, place)
            assert int(further_BT[row, place]) == (own[1] if len(own) == 2 else IGNORE_INDEX), (index, place)


def test_prepared_data_must_fit_the_model(prepared_data: Path, mini: Callable[..., JobConfig]) -> None:
    config, manifest = mini(), read_manifest(str(prepared_data))
    size = config.model.vocab_size
    check_fits(replace(manifest, vocab_size=size), config, "run")
    with pytest.raises(ConfigError, match=rf"model\.vocab_size is {size}.* has {size + 1} tokens"):
        check_fits(replace(manifest, vocab_size=size + 1), config, "run")
    with pytest.raises(ConfigError, match=r"data\.sequence_length is 32.* run/data has 33"):
        check_fits(replace(manifest, sequence_length=33), config, "run")
