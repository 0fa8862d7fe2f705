"""Batches of a training rank: read, collated and pinned by a background thread while the step before is computed."""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from cherry.data.collate import MicroBatch, micro_batch
from cherry.data.sampler import Sampler
from cherry.data.shards import TokenDataset
from cherry.data.target_counts import TargetCounts
from cherry.job_config import JobConfig

# Optimizer steps that are read ahead: one hides an even reading time, the second a read that takes longer than a step.
_STEPS_AHEAD = 2


@dataclass(frozen=True)
class StepBatch:
    """One rank's micro-batches of an optimizer step, and the target counts of the whole step."""

    micro_batches: list[MicroBatch]
    """Micro-batches on the CPU; pinned where training runs on a GPU."""
    targets: int
    """Targets of the step that bear loss, over all ranks and micro-batches; at least 1, so that it can divide."""
    mtp_targets: int
    """The MTP module's targets that bear loss; at least 1, too."""


class BatchReader:
    """Reads this rank's share of every batch, some optimizer steps ahead.

    Args:
        data_rank: this rank among the `data_ranks` that read sequences of their own, every `data_ranks`-th of a batch.
        micro_batches: number of equal parts of this rank's share.
        keep_apart: see `collate.micro_batch`.
        device: where training runs.
    """

    def __init__(
        self,
        dataset: TokenDataset,
        sampler: Sampler,
        counts: TargetCounts,
        *,
        data_rank: int,
        data_ranks: int,
        micro_batches: int,
        keep_apart: bool,
        device: torch.device,
    ) -> None:
        self._dataset = dataset
        self._sampler = sampler
        self._counts = counts
        self._data_rank = data_rank
        self._data_ranks = data_ranks
        self._micro_batches = micro_batches
        self._keep_apart = keep_apart
        self._device = device
        self._ahead: deque[tuple[int, Future[StepBatch]]] = deque()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="batches", initializer=self._set_up_thread)

    def take(self, position: int) -> StepBatch:
        """The batch that begins at `position`, counted in sequences; the next batches are read in the background.

        Raises:
            Exception: any error from reading this batch.
        """
        if not self._ahead or self._ahead[0][0] != position:
            self._drop()
            self._begin(position)
        _, batch = self._ahead.popleft()
        while len(self._ahead) < _STEPS_AHEAD:
            last = self._ahead[-1][0] if self._ahead else position
            self._begin(last + self._sampler.batch_size)
        return batch.result()

    def read(self, position: int) -> StepBatch:
        """The batch that begins at `position`, read on the calling thread and not pinned."""
        indices = self._sampler.indices(position)
        own = indices[self._data_rank :: self._data_ranks]
        size = len(own) // self._micro_batches
        cut = [own[start : start + size] for start in range(0, len(own), size)]
        batches = [micro_batch(self._dataset, part, keep_apart=self._keep_apart) for part in cut]
        targets, mtp_targets = self._counts.of(indices)
        return StepBatch(batches, max(1, targets), max(1, mtp_targets))

    def close(self) -> None:
        """Cancel reads in flight and join the thread; `read` still works."""
        self._drop()
        self._thread.shutdown(wait=True)

    def _begin(self, position: int) -> None:
        self._ahead.append((position, self._thread.submit(self._read_pinned, position)))

    def _drop(self) -> None:
        for _, batch in self._ahead:
            batch.cancel()
        self._ahead.clear()

    def _read_pinned(self, position: int) -> StepBatch:
        batch = self.read(position)
        if self._device.type != "cuda":
            return batch
        pinned = [part.pin_memory() for part in batch.micro_batches]
        return StepBatch(pinned, batch.targets, batch.mtp_targets)

    def _set_up_thread(self) -> None:
        """Set the thread count and the GPU of the reading thread, as torch's DataLoader does for its pinning thread."""
        torch.set_num_threads(1)  # more OpenMP threads than cores slow training's down; as checkpointer.py explains
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)


def batch_reader(
    dataset: TokenDataset, directory: Path, config: JobConfig, data_rank: int, data_ranks: int, device: torch.device
) -> BatchReader:
    """Reader of a job's batches on a rank, in the order of its seed.

    Args:
        directory: of the prepared data; target counts are kept there.
    """
    apart = not config.data.cross_document_attention
    return BatchReader(
        dataset,
        Sampler(len(dataset), config.seed, config.train.batch_size),
        TargetCounts(dataset, directory, keep_apart=apart),
        data_rank=data_rank,
        data_ranks=data_ranks,
        micro_batches=config.train.gradient_accumulation_steps,
        keep_apart=apart,
        device=device,
    )
