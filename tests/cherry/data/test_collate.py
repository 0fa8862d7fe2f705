"""Collation of sequences to micro-batches: tokens, targets of the head and of the MTP module, and documents."""

from __future__ import annotations

import torch

from cherry.data.collate import mtp_targets
from cherry.loss import IGNORE_INDEX


def test_the_mtp_module_predicts_one_token_further() -> None:
    targets_BT = torch.tensor([[5, 6, IGNORE_INDEX, 8], [1, 2, 3, 4]])
    expected_BT = torch.tensor([[6, IGNORE_INDEX, 8, IGNORE_INDEX], [2, 3, 4, IGNORE_INDEX]])
    assert mtp_targets(targets_BT).equal(expected_BT)
