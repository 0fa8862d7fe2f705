"""Owns the training loop of one rank: set-up, the optimizer step, and when to report, evaluate and save.

It knows nothing of flows or tracking: a resolved config comes in; checkpoints, metrics.jsonl and result.json go out.

Shapes: B sequences of a micro-batch, T position, N = B T, D hidden, L mixture layer, E expert.
"""

from __future__ import annotations

import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.logging import get_logger
from torch import Tensor

from base import storage
from base.errors import NonFiniteLossError
from base.progress import print_progress
from cherry.checkpoint.checkpointer import Checkpointer, restore
from cherry.checkpoint.fence import Fence
from cherry.checkpoint.naming import newest_checkpoint
from cherry.checkpoint.resume_rules import checkpoints_of, identity
from cherry.data.collate import MicroBatch, check_fits, micro_batch
from cherry.data.prepare import Sampler, TokenDataset
from cherry.distributed import fsdp_hooks
from cherry.distributed.mesh import data_share
from cherry.heldout import Heldout, evaluate_heldout
from cherry.job_config import JobConfig
from cherry.metrics import MFU_CONVENTION, MetricsWriter, expert_load, format_line, peak_flops, peak_memory_bytes
from cherry.optim.build import learning_rate, set_learning_rate
from cherry.optim.expert_bias import expert_counts, update_expert_bias
from cherry.spike_guard import Figures, StepGuard
from cherry.train_record import TrainRecord
from cherry.training_model import build

logger = get_logger(__name__)
# Expert loads of every layer are many numbers: one heat-map column in so many steps is enough.
_LOAD_EVERY_STEPS = 10
# Nobody reads ten lines a second, and whoever relays them pays for each; metrics.jsonl has them all.
_SAY_EVERY_S = 1.0


@dataclass
class Progress:
    """The listed resume state, with the step guard's."""

    step: int = 0
    """Optimizer steps, those that were skipped included."""
    position: int = 0
    """Sequences that were read: where the next batch begins. Not the step times the batch's size, which may change,
    and after a rollback what led to it is not read again."""
    tokens: int = 0
    """Of the steps that were taken."""
    seconds: float = 0.0
    rollbacks: int = 0


class Trainer:
    """One rank of one job.

    Args:
        resume_from: URI of a committed checkpoint; `None` takes the run's newest one, if there is any.
    """

    def __init__(self, config: JobConfig, run_directory: str, *, resume_from: str | None = None) -> None:
        self.config = config
        self.run_directory = run_directory
        self.rank, self.ranks = dist.get_rank(), dist.get_world_size()
        self.accelerator = Accelerator(cpu=not torch.cuda.is_available())
        self.device = self.accelerator.device
        self.share = data_share(config.parallel, self.rank, self.ranks)
        self.dataset = TokenDataset(storage.join(run_directory, "data"))
        check_fits(self.dataset.manifest, config, run_directory)
        self.sampler = Sampler(len(self.dataset), config.seed, config.train.batch_size)
        self.network = build(config, self.device, self._say)
        self.model = self.network.model
        self.communication = fsdp_hooks.install(self.network.module, config.communication)
        self.optimizer = self.accelerator.prepare_optimizer(self.network.optimizer)
        group = dist.new_group(backend="gloo")
        fence = Fence(storage.join(run_directory, "train")) if self.rank == 0 else None
        directory = checkpoints_of(config, run_directory)
        self.checkpointer = Checkpointer(
            directory,
            keep_last=config.checkpoint.keep_last,
            keep_every_steps=config.checkpoint.keep_every_steps,
            asynchronous=config.checkpoint.asynchronous,
            group=group,
            fence=fence,
        )
        self.progress = Progress()
        self.guard = StepGuard(config.train.spike_sigma)
        self._good_before: int | None = None  # after a rollback, until something new is saved
        self._save_owed, self._group = False, group
        self._heldout: Heldout | None = None
        self._say_from = 0.0  # by the monotonic clock
        self._resume(resume_from, directory)
        self.network.start()
        self.metrics = self._open_metrics()
        # A processor's is only measured, beside whatever else it does: MFU against it would not compare between runs.
        self.peak_flops = peak_flops(self.device, config.train.precision) if self.device.type == "cuda" else None

    def _resume(self, resume_from: str | None, directory: str) -> None:
        found = [resume_from or (newest_checkpoint(directory) if self.rank == 0 else None)]
        dist.broadcast_object_list(found, group=self._group)
        self._started_from = found[0]
        if found[0] is not None:
            self._restore(found[0])
            self._say(f"resumed from {found[0]}: {self.progress.step} steps, {self.progress.tokens:,} tokens")

    def _restore(self, uri: str) -> None:
        model = self.config.model.model_dump(mode="json")
        self.network.fold()
        record = restore(uri, self.model, self.optimizer.optimizer, self._group, expected_model=model)
        self.network.start()
        self.communication.restore(uri, self._group)
        self.progress = Progress(**{key: record[key] for key in asdict(Progress()) if key in record})
        if "guard" in record:
            self.guard.restore(record["guard"])
        self.checkpointer.last_saved = uri  # an attempt may have died between the last save and the result

    def _open_metrics(self) -> MetricsWriter | None:
        path = Path(storage.local_path(self.run_directory)) / "train" / "metrics.jsonl"
        return MetricsWriter(path, resume_step=self.progress.step) if self.rank == 0 else None

    def run(self) -> dict[str, Any]:
        """Train to the last step; the result that result.json holds (rank 0's; others get the same figures).

        Raises:
            NonFiniteLossError: too many steps in a row had a loss or gradient norm that was not finite or a spike, and
                there is no going back.
            SupersededError: a newer attempt took the run over.
            StorageError: the last checkpoint could not be written.
        """
        train = self.config.train
        try:
            while self.progress.step < train.steps:
                record = self._step()
                if self.guard.in_a_row >= min(train.max_skipped_steps, train.steps):
                    self._go_back(record)
                    continue
                done = self.progress.step
                last = done == train.steps
                due = train.evaluate_every_steps is not None and done % train.evaluate_every_steps == 0
                if last or due:
                    record.heldout_loss = self.heldout().loss
                if failed := self.checkpointer.new_failures():
                    record.failed_saves = [str(error) for error in failed]
                self._report(record, last=last)
                self._save_owed |= done % self.config.checkpoint.every_steps == 0
                # A checkpoint in the middle of skipped steps would pass for a good one.
                if last or (self._save_owed and not self.guard.in_a_row):
                    self._save()
            self.checkpointer.wait()
        finally:
            self.close()
        # What is exported is the last checkpoint: an older one would pass for it.
        if self.checkpointer.failures and self.checkpointer.last_saved_step != self.progress.step:
            raise self.checkpointer.failures[-1]
        return self._result()

    def close(self) -> None:
        """Finish the save in flight and close the files; `run` does it by itself."""
        try:
            self.checkpointer.close()
        finally:
            if self.metrics is not None:
                self.metrics.close()

    def _step(self) -> TrainRecord:
        """One optimizer step over this rank's share of the batch."""
        train, started = self.config.train, time.perf_counter()
        step = self.progress.step
        set_learning_rate(self.optimizer.optimizer, rate := learning_rate(train, step))
        micro_batches = self._micro_batches(self.progress.position)
        # The loss is divided by the tokens of the whole optimizer step, so that accumulation and ranks change nothing.
        valid = torch.tensor([batch.valid() for batch in micro_batches], dtype=torch.float64)
        counts = self._sum_over_ranks(valid.sum(dim=0)) / self.share.parts
        tokens, tokens_mtp = max(1.0, float(counts[0])), max(1.0, float(counts[1]))
        parts = len(micro_batches) * self.share.ranks
        sums = self._backward(micro_batches, tokens, tokens_mtp, parts)
        norm = self.network.gradient_norm()
        take_step = self.network.ready_step(norm, train.max_grad_norm)
        layers = self.model.moe_layers()
        counts_LE = expert_counts(layers).to(sums.device)
        # One sum for everything, the norm as a mean: all ranks judge the very same numbers, and wait for them once.
        sums = torch.cat([sums, norm.double()[None] / self.ranks, counts_LE.double().flatten()])
        sums, load = self._sum_over_ranks(sums).tensor_split([4])
        load_LE = load.view_as(counts_LE).float()
        figures = Figures(float(sums[0]) / tokens, float(sums[3]))
        skipped = self.guard.judge(figures)
        if skipped is None:
            take_step()
        else:
            self.communication.forget()
        # Behind the optimizer's step, which takes the GPU long enough to queue this and the next pass.
        bias_rate = train.expert_bias_update_rate if skipped is None else 0.0
        update_expert_bias(layers, bias_rate, load_LE.to(self.device))
        self.network.clear()
        seconds = time.perf_counter() - started
        batch_tokens = train.batch_size * self.config.data.sequence_length
        self.progress.step += 1
        self.progress.position += train.batch_size
        self.progress.tokens += batch_tokens if skipped is None else 0
        self.progress.seconds += seconds
        busiest, shares = expert_load(load_LE, whole=(step + 1) % _LOAD_EVERY_STEPS == 0 or step + 1 == train.steps)
        return TrainRecord(
            step=self.progress.step,
            steps=train.steps,
            loss=figures.loss,
            mtp_loss=float(sums[1]) / tokens_mtp,
            balance_loss=float(sums[2]) / parts,
            grad_norm=figures.grad_norm,
            learning_rate=rate,
            tokens_per_second=batch_tokens / seconds,
            mfu=self._mfu(batch_tokens / seconds),
            mfu_convention=MFU_CONVENTION,
            expert_load_max_over_mean=busiest,
            expert_load=shares,
            **self.communication.traffic.figures(),
            step_seconds=seconds,
            seconds_left=self.progress.seconds / self.progress.step * (train.steps - self.progress.step),
            tokens=self.progress.tokens,
            skipped_steps=self.guard.skipped,
            rollbacks=self.progress.rollbacks,
            skipped=skipped,
            time=time.time(),
        )

    def _backward(self, micro_batches: list[MicroBatch], tokens: float, tokens_mtp: float, parts: int) -> Tensor:
        """Gradients of this rank's share; its sums of the three losses, fp64 [3]."""
        train = self.config.train
        sums = torch.zeros(3, dtype=torch.float64, device=self.device)
        self.communication.traffic.clear()
        for number, batch in enumerate(micro_batches, 1):
            self.communication.micro_batch(last=number == len(micro_batches))
            loss, mtp_loss, balance = self.network.module(*batch.to(self.device))
            total = loss / tokens + train.mtp_loss_weight * mtp_loss / tokens_mtp
            (total + train.balance_loss_weight * balance / parts).backward()
            sums += torch.stack([loss.detach(), mtp_loss.detach(), balance.detach()]).double()
        return sums

    def _go_back(self, record: TrainRecord) -> None:
        """Too many steps in a row were skipped: go on from the last good checkpoint with the data after this step's.

        Raises:
            NonFiniteLossError: `train.on_divergence` says stop, there were too many rollbacks, or no checkpoint.
        """
        train, reached = self.config.train, self.progress
        self._report(record, last=True)
        target = self._last_good() if train.on_divergence == "rollback" else None
        if target is None or reached.rollbacks == train.max_rollbacks:
            told = f"{reached.rollbacks} rollbacks" if reached.rollbacks else "no rollback"
            raise NonFiniteLossError(
                f"step {reached.step}: {record.skipped}, and the {self.guard.in_a_row} steps up to it were skipped "
                f"(train.max_skipped_steps) after {told}. What is committed in {self.checkpointer.directory} is whole. "
                "Lower train.learning_rate, raise train.warmup_steps, or look at the data of these steps."
            )
        skipped = self.guard.skipped
        self._restore(target)
        self.guard.skipped = skipped
        self.guard.forgive()
        self.progress.position = reached.position
        self.progress.rollbacks = reached.rollbacks + 1
        self.progress.seconds = reached.seconds
        self._good_before, self._save_owed = self.progress.step, False
        if self.metrics is not None:
            self.metrics.close()
        self.metrics = self._open_metrics()
        passed, nth = reached.step - self.progress.step, self.progress.rollbacks
        self._say(f"went back to {target}: {passed} batches passed over, rollback {nth}")

    def _last_good(self) -> str | None:
        """The newest checkpoint of this run; where going back to it led nowhere, the one before it."""
        self.checkpointer.wait()
        found: list[str | None] = [None]
        if self.rank == 0:
            limit = self.progress.step + 1 if self._good_before is None else self._good_before
            found = [newest_checkpoint(self.checkpointer.directory, before=limit)]
        dist.broadcast_object_list(found, group=self._group)
        return found[0] or self._started_from

    def _micro_batches(self, position: int) -> list[MicroBatch]:
        """This rank's share of the batch that begins at `position`."""
        chosen = self.sampler.indices(position, self.share.rank, self.share.ranks)
        size = len(chosen) // self.config.train.gradient_accumulation_steps
        parts = (chosen[start : start + size] for start in range(0, len(chosen), size))
        apart = not self.config.data.cross_document_attention
        return [micro_batch(self.dataset, part, keep_apart=apart) for part in parts]

    def _sum_over_ranks(self, values: Tensor) -> Tensor:
        if self.ranks > 1:
            values = values.to(self.device)
            dist.all_reduce(values)
        return values.cpu()

    def _mfu(self, tokens_per_second: float) -> float | None:
        if self.peak_flops is None:
            return None
        per_token = self.config.model.flops_per_token(self.config.data.sequence_length, with_mtp=True)
        return tokens_per_second * per_token / (self.peak_flops * self.ranks)

    def heldout(self) -> Heldout:
        """The held-out loss now, over `train.heldout_sequences` windows' worth of documents, shared by the ranks."""
        self._heldout = evaluate_heldout(self.network.module, self.config, self.run_directory, self.device, self.share)
        return self._heldout

    def _report(self, record: TrainRecord, *, last: bool) -> None:
        if self.metrics is None:
            return
        due = self.progress.step % self.config.train.log_every_steps == 0
        marked = last or record.marked
        if due or marked:
            self.metrics.write(record)
            if marked or time.monotonic() >= self._say_from:
                self._say(format_line(record), fraction=record.step / self.config.train.steps)
                self._say_from = time.monotonic() + _SAY_EVERY_S
        if record.skipped is not None:
            self._say(f"step {self.progress.step} skipped: {record.skipped}")
        if failure := self.metrics.new_failure():
            self._say(f"metrics wait in memory, training goes on: {failure}")
        for failed_save in record.failed_saves or ():
            self._say(f"checkpoint not saved, training goes on: {failed_save}")

    def _save(self) -> None:
        record = {
            **asdict(self.progress),
            "steps": self.config.train.steps,
            "guard": self.guard.state(),
            "world_size": self.ranks,
            **identity(self.config, self.dataset.manifest),
            "model": self.config.model.model_dump(mode="json"),
        }
        self.network.fold()
        unsent = self.communication.state()
        self.checkpointer.save(self.progress.step, self.model, self.optimizer.optimizer, record, unsent)
        if unsent:
            self.checkpointer.wait_until_copied()  # the next backward pass writes over it
        self._save_owed, self._good_before = False, None

    def _result(self) -> dict[str, Any]:
        heldout = self._heldout or self.heldout()  # evaluated at the last step, but not when there was none left
        first = self.metrics.first_loss if self.metrics is not None else None
        result = {
            "steps": self.progress.step,
            "loss_first": first,
            "loss_last": self.guard.last_loss,
            "heldout_loss": heldout.loss,
            "heldout_bits_per_byte": heldout.bits_per_byte,
            "tokens": self.progress.tokens,
            "seconds": self.progress.seconds,
            "tokens_per_second": self.progress.tokens / max(self.progress.seconds, 1e-9),
            "step_seconds_mean": self.progress.seconds / max(self.progress.step, 1),
            "peak_memory_gib": peak_memory_bytes(self.device) / 2**30,
            "checkpoint": self.checkpointer.last_saved,
            "parameters": self.config.model.parameters(with_mtp=True),
            "world_size": self.ranks,
            "device": torch.cuda.get_device_name() if self.device.type == "cuda" else f"cpu, {os.cpu_count()} cores",
            "skipped_steps": self.guard.skipped,
            "rollbacks": self.progress.rollbacks,
            "failed_saves": [str(error) for error in self.checkpointer.failures],
            "versions": {"torch": torch.__version__},
        }
        if self.rank == 0:
            storage.write_json(storage.join(self.run_directory, "train", "result.json"), result)
        return result

    def _say(self, line: str, *, fraction: float | None = None) -> None:
        """Print a line from the main process, as progress if it has a fraction of the run, and write it to the log."""
        if self.accelerator.is_main_process:
            if fraction is None:
                print(line, flush=True)
            else:
                print_progress(line, fraction)
        logger.info(line)
