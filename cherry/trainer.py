"""The training loop of one rank: set-up, the optimizer step, evaluation, saves, and rollback after divergence.

A resolved config comes in; checkpoints, metrics.jsonl and result.json go out. Everything else that observes a run is
a hook (cherry/hooks/protocol.py).

Shapes: B sequences of a micro-batch, T position, N = B T, D hidden, L MoE layer, E expert.
"""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor

from base import storage
from base.errors import NonFiniteLossError, StoppedError
from base.progress import print_progress
from cherry.checkpoint.checkpointer import Checkpointer, restore
from cherry.checkpoint.claim import fenced_directories
from cherry.checkpoint.fence import Fence
from cherry.checkpoint.naming import newest_checkpoint
from cherry.checkpoint.resume_rules import Progress, checkpoints_of, identity, rate_change, settled
from cherry.corruption.recheck import Recheck
from cherry.corruption.self_check import SelfCheck
from cherry.data.batches import StepBatch, batch_reader
from cherry.data.collate import check_fits
from cherry.data.shards import TokenDataset
from cherry.distributed import fsdp_hooks
from cherry.distributed.mesh import data_shard
from cherry.heldout import Heldout, evaluate_heldout
from cherry.hooks.build import build_hooks
from cherry.hooks.metrics_hook import MetricsHook
from cherry.hooks.protocol import HookList, TrainerHook
from cherry.job_config import JobConfig
from cherry.metrics import MFU_CONVENTION, expert_load, peak_flops, peak_memory_bytes
from cherry.optim.build import learning_rate, set_learning_rate
from cherry.optim.expert_bias import expert_counts, update_expert_bias
from cherry.spike_guard import Figures, StepGuard
from cherry.train_record import METRICS_FILE, TrainRecord
from cherry.training_model import build

logger = logging.getLogger(__name__)
# Expert loads of every layer are many numbers: one heat-map column in so many steps is enough.
_LOAD_EVERY_STEPS = 10


class Trainer:
    """The training loop of one rank.

    Args:
        resume_from: URI of a committed checkpoint; `None` resumes from the run's newest one, if there is any.
        hooks: called after the trainer's own, which write metrics.jsonl and profiles.
    """

    def __init__(
        self,
        config: JobConfig,
        run_directory: str,
        *,
        resume_from: str | None = None,
        hooks: Sequence[TrainerHook] = (),
    ) -> None:
        self.config, self.run_directory = config, run_directory
        self.batch_tokens = config.train.batch_size * config.data.sequence_length
        self.rank, self.ranks = dist.get_rank(), dist.get_world_size()
        self.accelerator = Accelerator(cpu=not torch.cuda.is_available())
        self.device = self.accelerator.device
        self.share = data_shard(config.parallel, self.rank, self.ranks)
        self.dataset = TokenDataset(storage.join(run_directory, "data"))
        check_fits(self.dataset.manifest, config, run_directory)
        data = Path(storage.local_path(run_directory)) / "data"
        self.batches = batch_reader(
            self.dataset, data, config, self.share.data_rank, self.share.data_ranks, self.device
        )
        self.network = build(config, self.device, self._print_line)
        self.model = self.network.model
        self.communication = fsdp_hooks.install(self.network.module, config.communication)
        self.optimizer = self.accelerator.prepare_optimizer(self.network.optimizer)
        group = dist.new_group(backend="gloo")
        fence = Fence(*fenced_directories(config, run_directory)) if self.rank == 0 else None
        directory = checkpoints_of(config, run_directory)
        self.checkpointer = Checkpointer(
            directory,
            keep_last=config.checkpoint.keep_last,
            keep_every_steps=config.checkpoint.keep_every_steps,
            asynchronous=config.checkpoint.asynchronous,
            group=group,
            fence=fence,
        )
        self.progress, self.guard = Progress(), StepGuard(config.train.spike_sigma)
        self.recheck = Recheck(config, self.network, self.communication, self.device)
        self._rollback_before: int | None = None  # after a rollback, until the next save: the step it restored
        self._save_owed, self._told_to_end, self._group = False, False, group
        self._heldout: Heldout | None = None
        saved = self._resume(resume_from, directory)
        self.network.start(self.communication)
        self.metrics = self._metrics_hook(saved) if self.rank == 0 else None
        own = [hook for hook in (self.metrics, self._self_check()) if hook is not None]
        built = build_hooks(config, self.network.module, self._train_directory, self.device, self._print_line)
        self.hooks = HookList([*own, *built, *hooks], self._print_line)
        # A CPU has no data sheet peak; a measured one depends on its load, so MFU would not compare between runs.
        self.peak_flops = peak_flops(self.device, config.train.precision) if self.device.type == "cuda" else None

    def _resume(self, resume_from: str | None, directory: str) -> list[str]:
        """Lines of metrics.jsonl that the run's checkpoint keeps, after restoring its state."""
        found = [resume_from or (newest_checkpoint(directory) if self.rank == 0 else None)]
        dist.broadcast_object_list(found, group=self._group)
        self._started_from = start = found[0]
        if start is None:
            return []
        record = self._restore(start)
        self.progress.resumed_from = settled(resume_from) if resume_from else self.progress.resumed_from
        if change := rate_change(self.config.train, record):
            self.progress.changes.append(change)
            self._print_line(change)
        self._print_line(f"resumed from {start}: {self.progress.step} steps, {self.progress.tokens:,} tokens")
        return record.get("metrics", []) if resume_from is None else []  # else they may be another run's

    def _restore(self, uri: str) -> dict[str, Any]:
        model = self.config.model.model_dump(mode="json")
        self.network.reshard()
        record = restore(uri, self.model, self.optimizer.optimizer, self._group, expected_model=model)
        self.network.start(self.communication)
        self.communication.restore(uri, self._group)
        self.progress = Progress(**{key: record[key] for key in asdict(Progress()) if key in record})
        if "guard" in record:
            self.guard.restore(record["guard"])
        self.checkpointer.last_saved = uri  # an attempt may have died between the last save and the result
        return record

    def _metrics_hook(self, saved: list[str]) -> MetricsHook:
        path, every, step = self._train_directory / METRICS_FILE, self.config.train.log_every_steps, self.progress.step
        return MetricsHook(path, resume_step=step, log_every_steps=every, print_line=self._print_line, saved=saved)

    def _self_check(self) -> SelfCheck | None:
        every = self.config.train.self_check_every_steps
        return None if every is None else SelfCheck(every, self.device, self._print_line)

    @property
    def _train_directory(self) -> Path:
        return Path(storage.local_path(self.run_directory)) / "train"

    def run(self) -> dict[str, Any]:
        """Content of result.json, after training to the last step; rank 0 writes the file.

        Raises:
            NonFiniteLossError: too many steps in a row had a spike or a value that is not finite in loss or gradient
                norm, and a rollback was not possible.
            HardwareError: a device computed something else from the same inputs.
            StoppedError: SIGUSR2 told it to end.
            SupersededError: a newer attempt took over the run directory.
            StorageError: the last checkpoint could not be written.
        """
        train = self.config.train
        try:
            while self.progress.step < train.steps:
                self.hooks.on_step_begin(self.progress.step + 1)
                record = self._step()
                diverged = self.guard.consecutive_skips >= min(train.max_skipped_steps, train.steps)
                if not diverged:
                    self._evaluate_if_due(record)
                self.hooks.on_step_end(record)
                self.recheck.raise_if_found()
                if diverged:
                    self._rollback(record)
                else:
                    self._save_if_due()
            self.checkpointer.wait()
        finally:
            self.close()
        # The newest checkpoint is what is exported: an older one must not be taken for the last.
        if self.checkpointer.failures and self.checkpointer.last_saved_step != self.progress.step:
            raise self.checkpointer.failures[-1]
        return self._result()

    def _evaluate_if_due(self, record: TrainRecord) -> None:
        done, every = self.progress.step, self.config.train.evaluate_every_steps
        if done == self.config.train.steps or (every is not None and done % every == 0):
            heldout = self.heldout()
            record.heldout_loss = heldout.loss
            self.hooks.on_evaluate(done, heldout)
        if failed := self.checkpointer.new_failures():
            record.failed_saves = [str(error) for error in failed]

    def _save_if_due(self) -> None:
        done = self.progress.step
        self._save_owed |= self._told_to_end or done % self.config.checkpoint.every_steps == 0
        # Between skipped steps the state may have diverged already: a rollback must not find it.
        if done == self.config.train.steps or (self._save_owed and not self.guard.consecutive_skips):
            self._save()
            if self._told_to_end and done < self.config.train.steps:
                self.checkpointer.wait()
                raise StoppedError(f"told to end: step {done} is saved. Run the same command again to resume.")

    def close(self) -> None:
        """Finish the save in flight, end the reading thread and close the hooks; `run` does it by itself."""
        with ExitStack() as closing:
            closing.callback(self.hooks.close)
            closing.callback(self.batches.close)
            closing.callback(self.checkpointer.close)

    def _step(self) -> TrainRecord:
        """Record of one optimizer step over this rank's share of the batch."""
        train, step, started = self.config.train, self.progress.step, time.perf_counter()
        set_learning_rate(self.optimizer.optimizer, rate := learning_rate(train, step))
        batch = self.batches.take(self.progress.position)
        micro_batches = len(batch.micro_batches) * self.share.data_ranks
        losses = self.recheck.compute(lambda: self._backward(batch, micro_batches))
        take_step = self.network.ready_step(norm := self.network.gradient_norm(), train.max_grad_norm)
        layers = self.model.moe_layers()
        sums, load_LE = self._sum_over_ranks(losses, norm, expert_counts(layers).to(losses.device))
        figures, self._told_to_end = Figures(float(sums[0]) / batch.targets, float(sums[3])), bool(sums[4])
        skipped, corruption = self.guard.check_step(figures), None
        if skipped is None:
            take_step()
        else:
            del take_step  # it holds these gradients
            corruption = self.recheck.check_step(step + 1, skipped)
            self.communication.reset_error_feedback()
        # After the optimizer's step, which keeps the GPU busy while this and the next forward pass are queued.
        update_expert_bias(layers, 0.0 if skipped else train.expert_bias_update_rate, load_LE.to(self.device))
        self.network.zero_grad()
        seconds = time.perf_counter() - started
        self.progress.add_step(sequences=train.batch_size, tokens=0 if skipped else self.batch_tokens, seconds=seconds)
        busiest, shares = expert_load(load_LE, whole=(step + 1) % _LOAD_EVERY_STEPS == 0 or step + 1 == train.steps)
        sent = self.communication.traffic.totals()
        return TrainRecord(
            step=self.progress.step,
            steps=train.steps,
            loss=figures.loss,
            mtp_loss=float(sums[1]) / batch.mtp_targets,
            balance_loss=float(sums[2]) / micro_batches,
            grad_norm=figures.grad_norm,
            learning_rate=rate,
            tokens_per_second=self.batch_tokens / seconds,
            mfu=self._mfu(self.batch_tokens / seconds),
            mfu_convention=MFU_CONVENTION,
            expert_load_max_over_mean=busiest,
            expert_load=shares,
            bytes_on_wire=sent.by_collective,
            bytes_on_wire_total=sent.total,
            reduction_bytes_over_fp32=sent.reduction_over_fp32,
            step_seconds=seconds,
            seconds_left=self.progress.seconds / self.progress.step * (train.steps - self.progress.step),
            tokens=self.progress.tokens,
            skipped_steps=self.guard.skipped,
            rollbacks=self.progress.rollbacks,
            skipped=skipped,
            corruption=corruption,
            time=time.time(),
        )

    def _sum_over_ranks(self, losses: Tensor, norm: Tensor, counts_LE: Tensor) -> tuple[Tensor, Tensor]:
        """The three losses, the norm and whether a rank was told to end, fp64 [5], and the experts' load [L, E].

        One all-reduce for everything (the norm as a mean): all ranks decide by the same numbers, and wait once.
        """
        # A rank that was told to end leaves the signal pending, since all have to end after the same step.
        told = losses.new_full((1,), float(signal.SIGUSR2 in signal.sigpending()))
        sums = torch.cat([losses, norm.double()[None] / self.ranks, told, counts_LE.double().flatten()]).to(self.device)
        if self.ranks > 1:
            dist.all_reduce(sums)
        sums, load = sums.cpu().tensor_split([5])
        return sums, load.view_as(counts_LE).float()

    def _backward(self, batch: StepBatch, micro_batches: int) -> Tensor:
        """Sums of the three losses over this rank's share, fp64 [3]; the gradients are left in the parameters.

        Losses are divided by the targets of the whole optimizer step, so that accumulation and ranks change nothing.

        Args:
            micro_batches: those of all ranks, over which the balance loss is a mean.
        """
        train = self.config.train
        sums = torch.zeros(3, dtype=torch.float64, device=self.device)
        self.communication.traffic.clear()
        for number, micro_batch in enumerate(batch.micro_batches, 1):
            self.communication.micro_batch(last=number == len(batch.micro_batches))
            loss, mtp_loss, balance = self.network.module(*micro_batch.to(self.device))
            total = loss / batch.targets + train.mtp_loss_weight * mtp_loss / batch.mtp_targets
            (total + train.balance_loss_weight * balance / micro_batches).backward()
            sums += torch.stack([loss.detach(), mtp_loss.detach(), balance.detach()]).double()
        return sums

    def _rollback(self, record: TrainRecord) -> None:
        """Restore the last good checkpoint after too many skipped steps; the data read since is not read again.

        Args:
            record: record of the last of these steps.

        Raises:
            NonFiniteLossError: `train.on_divergence` is stop, there were too many rollbacks, or there is no checkpoint.
        """
        train, reached = self.config.train, self.progress
        target = self._last_good() if train.on_divergence == "rollback" else None
        if target is None or reached.rollbacks == train.max_rollbacks:
            count = f"{reached.rollbacks} rollbacks" if reached.rollbacks else "no rollback"
            raise NonFiniteLossError(
                f"step {reached.step}: {record.skipped}, and the {self.guard.consecutive_skips} steps up to it were "
                f"skipped (train.max_skipped_steps) after {count}. What is committed in {self.checkpointer.directory} "
                "is complete. Lower train.learning_rate, raise train.warmup_steps, or look at the data of these steps."
            )
        skipped = self.guard.skipped
        self._restore(target)
        self.checkpointer.roll_back(self.progress.step)
        self.guard.skipped = skipped
        self.guard.reset_consecutive_skips()
        self.progress.position, self.progress.seconds = reached.position, reached.seconds
        self.progress.rollbacks = reached.rollbacks + 1
        self.progress.resumed_from, self.progress.changes = reached.resumed_from, reached.changes
        self._rollback_before, self._save_owed = self.progress.step, False
        passed, nth = reached.step - self.progress.step, self.progress.rollbacks
        self._print_line(f"rolled back to {target}: {passed} batches passed over, rollback {nth}")

    def _last_good(self) -> str | None:
        """URI of the newest checkpoint of this run, or of the one before it where a rollback to it failed already."""
        self.checkpointer.wait()
        found: list[str | None] = [None]
        if self.rank == 0:
            limit = self.progress.step + 1 if self._rollback_before is None else self._rollback_before
            found = [newest_checkpoint(self.checkpointer.directory, before=limit)]
        dist.broadcast_object_list(found, group=self._group)
        return found[0] or self._started_from

    def _mfu(self, tokens_per_second: float) -> float | None:
        per_token = self.config.model.flops_per_token(self.config.data.sequence_length, with_mtp=True)
        return None if self.peak_flops is None else tokens_per_second * per_token / (self.peak_flops * self.ranks)

    def heldout(self) -> Heldout:
        """Held-out loss now, over at most `train.heldout_sequences` documents, which the data ranks divide."""
        self._heldout = evaluate_heldout(self.network.module, self.config, self.run_directory, self.device, self.share)
        return self._heldout

    def _save(self) -> None:
        record = {
            **asdict(self.progress),
            "steps": self.config.train.steps,
            "guard": self.guard.state(),
            "world_size": self.ranks,
            "metrics": [] if self.metrics is None else self.metrics.recent(),
            **identity(self.config, self.dataset.manifest),
            "model": self.config.model.model_dump(mode="json"),
        }
        self.network.reshard()
        residuals = self.communication.state()
        self.checkpointer.save(self.progress.step, self.model, self.optimizer.optimizer, record, residuals)
        if residuals:
            self.checkpointer.wait_until_copied()  # the next backward pass overwrites them
        self.hooks.on_save(self.progress.step, self.checkpointer.uri_of(self.progress.step))
        self._save_owed, self._rollback_before = False, None

    def _result(self) -> dict[str, Any]:
        heldout = self._heldout or self.heldout()  # evaluated at the last step, unless the run had no step left
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
            "changes": self.progress.changes,
            "failed_saves": [str(error) for error in self.checkpointer.failures],
            "versions": {"torch": torch.__version__},
        }
        if self.rank == 0:
            storage.write_json(storage.join(self.run_directory, "train", "result.json"), result)
        return result

    def _print_line(self, line: str, fraction: float | None = None) -> None:
        """Print a line for people, on the main process only; with a fraction of the run, also as progress."""
        if self.accelerator.is_main_process:
            print(line, flush=True) if fraction is None else print_progress(line, fraction)
