"""Collation: packed sequences to a micro-batch of tokens, targets, and the targets that bear no loss.

Shapes: B sequences of a micro-batch, T position.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from base.errors import ConfigError
from cherry.data.shards import Manifest, TokenDataset
from cherry.job_config import JobConfig
from cherry.loss import IGNORE_INDEX
from model.document_mask import Documents


def check_fits(manifest: Manifest, config: JobConfig, run_directory: str) -> None:
    """Check that prepared data fits the configuration.

    Raises:
        ConfigError: the sequence length differs, or the vocabulary is larger than the model's.
    """
    if manifest.sequence_length != config.data.sequence_length:
        raise ConfigError(
            f"data.sequence_length is {config.data.sequence_length}, the prepared data in "
            f"{run_directory}/data has {manifest.sequence_length}. Prepare the data again."
        )
    if manifest.vocab_size > config.model.vocab_size:
        raise ConfigError(
            f"model.vocab_size is {config.model.vocab_size}, the prepared data has {manifest.vocab_size} tokens. "
            "Prepare the data again, or raise model.vocab_size."
        )


class MicroBatch(NamedTuple):
    """Input of one forward pass."""

    tokens_BT: Tensor
    """int64."""
    targets_BT: Tensor
    """int64; IGNORE_INDEX where the target bears no loss."""
    documents: Documents | None
    """Boundaries of documents, where attention stays within them; else `None`."""

    def to(self, device: torch.device) -> MicroBatch:
        """This micro-batch on a device; pinned memory is copied without waiting. The documents move in place."""
        documents = self.documents.to(device) if self.documents is not None else None
        tokens_BT, targets_BT = (x.to(device, non_blocking=True) for x in (self.tokens_BT, self.targets_BT))
        return MicroBatch(tokens_BT, targets_BT, documents)

    def pin_memory(self) -> MicroBatch:
        """This micro-batch in page-locked memory. The documents move in place."""
        documents = self.documents.pin_memory() if self.documents is not None else None
        return MicroBatch(self.tokens_BT.pin_memory(), self.targets_BT.pin_memory(), documents)


def micro_batch(dataset: TokenDataset, indices: Iterable[int], *, keep_apart: bool) -> MicroBatch:
    """Micro-batch of the given sequences of a dataset, on the CPU.

    Args:
        keep_apart: attention stays within documents. A document's first token is then no target, since the tokens
            before it belong to another document.
    """
    rows = [dataset.sequence(int(index)) for index in indices]
    tokens = torch.stack([torch.from_numpy(row[0]) for row in rows])
    bears = torch.stack([torch.from_numpy(row[1]) for row in rows])[:, 1:]
    tokens_BT, next_BT = tokens[:, :-1].contiguous(), tokens[:, 1:]
    if not keep_apart:
        return MicroBatch(tokens_BT, torch.where(bears, next_BT, IGNORE_INDEX), None)
    bos_id = dataset.manifest.bos_id
    targets_BT = torch.where(bears & (next_BT != bos_id), next_BT, IGNORE_INDEX)
    return MicroBatch(tokens_BT, targets_BT, Documents(tokens_BT, bos_id))


def mtp_targets(targets_BT: Tensor, documents: Documents | None = None) -> Tensor:
    """Targets of the MTP module [B, T]: the targets of the next position; none at the last position of a row.

    With `documents` there is also none at the last position of each document, which would use the next document's
    first token as input.
    """
    further_BT = torch.cat([targets_BT[:, 1:], torch.full_like(targets_BT[:, :1], IGNORE_INDEX)], dim=1)
    if documents is None:
        return further_BT
    last_BT = documents.position_BT.roll(-1, dims=1) == 0
    return further_BT.masked_fill(last_BT, IGNORE_INDEX)
