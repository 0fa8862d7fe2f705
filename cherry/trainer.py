"""Owns the training loop of one rank: set-up, the optimizer step, and when to report, evaluate and save.

It knows nothing of flows or tracking: a resolved config comes in; checkpoints, metrics.jsonl and result.json go out.

Shapes: B sequences of a micro-batch, T position, N = B T, D hidden, L mixture layer, E expert.
"""

from __future__ import annotations

import math
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.logging import get_logger
from torch import Tensor, nn

from base import storage
from base.errors import ConfigError, NonFiniteLossError
from cherry import sharding
from cherry.checkpoint import Checkpointer, newest_checkpoint, restore
from cherry.config import JobConfig
from cherry.data import Sampler, TokenDataset
from cherry.fence import Fence
from cherry.heldout import Heldout, evaluate_heldout
from cherry.loss import IGNORE_INDEX, cross_entropy_sum
from cherry.metrics import MFU_CONVENTION, MetricsWriter, format_line, peak_flops
from cherry.optimizer import build_optimizer, clip_gradients, learning_rate, set_learning_rate, update_expert_bias
from cherry.run_directory import checkpoints_of, identity
from model.transformer import Block, DeepseekV3

logger = get_logger(__name__)
# Expert loads of every layer are many numbers: one heat-map column in so many steps is enough.
_LOAD_EVERY_STEPS = 10


class TrainingModel(nn.Module):
    """The model with its losses inside `forward`, so that sharding gathers the head for exactly as long as needed."""

    def __init__(self, model: DeepseekV3, loss_chunk_tokens: int) -> None:
        super().__init__()
        self.model = model
        self.loss_chunk_tokens = loss_chunk_tokens

    def forward(self, tokens_BT: Tensor, targets_BT: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Sums over the micro-batch: cross-entropy, the MTP module's cross-entropy, and the mean balance loss."""
        out = self.model(tokens_BT)
        weight_VD = self.model.lm_head.weight.to(out.hidden_BTD.dtype)
        loss = self._sum(out.hidden_BTD, weight_VD, targets_BT)
        if out.mtp_hidden_BTD is None:
            return loss, torch.zeros_like(loss), out.balance_loss
        mtp_loss = self._sum(out.mtp_hidden_BTD, weight_VD, mtp_targets(targets_BT))
        return loss, mtp_loss, out.balance_loss

    def _sum(self, hidden_BTD: Tensor, weight_VD: Tensor, targets_BT: Tensor) -> Tensor:
        hidden_ND = hidden_BTD.flatten(0, 1)
        return cross_entropy_sum(hidden_ND, weight_VD, targets_BT.flatten(), chunk_tokens=self.loss_chunk_tokens)


def mtp_targets(targets_BT: Tensor) -> Tensor:
    """What the MTP module predicts: one token further; the last position of each row has none."""
    return torch.cat([targets_BT[:, 1:], torch.full_like(targets_BT[:, :1], IGNORE_INDEX)], dim=1)


@dataclass
class Progress:
    """The listed resume state."""

    step: int = 0
    position: int = 0
    """Sequences that were read: where the next batch begins. Not the step times the batch's size, which may change."""
    tokens: int = 0
    seconds: float = 0.0


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
        self.dataset = TokenDataset(storage.join(run_directory, "data"))
        self._check_data()
        self.sampler = Sampler(len(self.dataset), config.seed, config.train.batch_size)
        self.model, self.network = self._build()
        self.optimizer = self.accelerator.prepare_optimizer(build_optimizer(self.model, config.train))
        group = dist.new_group(backend="gloo")
        fence = Fence(storage.join(run_directory, "train")) if self.rank == 0 else None
        directory = checkpoints_of(config, run_directory)
        self.checkpointer = Checkpointer(
            directory,
            keep_last=config.checkpoint.keep_last,
            asynchronous=config.checkpoint.asynchronous,
            group=group,
            fence=fence,
        )
        self.progress = Progress()
        self._heldout: Heldout | None = None
        self._resume(resume_from, directory, group)
        path = Path(storage.local_path(run_directory)) / "train" / "metrics.jsonl"
        self.metrics = MetricsWriter(path, resume_step=self.progress.step) if self.rank == 0 else None
        self.peak_flops = peak_flops(self.device, config.train.precision)

    def _check_data(self) -> None:
        manifest, config = self.dataset.manifest, self.config
        if manifest.sequence_length != config.data.sequence_length:
            raise ConfigError(
                f"data.sequence_length is {config.data.sequence_length}, the prepared data in "
                f"{self.run_directory}/data has {manifest.sequence_length}. Prepare the data again."
            )
        if manifest.vocab_size > config.model.vocab_size:
            raise ConfigError(
                f"model.vocab_size is {config.model.vocab_size}, the prepared data has {manifest.vocab_size} tokens. "
                "Prepare the data again, or raise model.vocab_size."
            )

    def _build(self) -> tuple[DeepseekV3, nn.Module]:
        config = self.config
        with torch.device("meta"):
            model = DeepseekV3(config.model)
        network: nn.Module = TrainingModel(model, config.train.loss_chunk_tokens)
        mesh = sharding.build_mesh(config.parallel, self.device)
        if config.train.activation_checkpointing == "full":
            _wrap_blocks(model)
        if config.train.compile:
            for module in model.modules():
                if isinstance(module, Block):
                    module.compile()
        if mesh is None and config.train.precision == "bf16":
            raise ConfigError("train.precision bf16 needs a GPU or several ranks (it is slower on one CPU). Use fp32.")
        sharding.shard_model(network, mesh, config.train.precision)
        network.to_empty(device=self.device)
        sharding.initialize(model, config.seed)
        if config.init_from is not None:
            sharding.load_weights(model, config.init_from)
        return model, network.train()

    def _resume(self, resume_from: str | None, directory: str, group: dist.ProcessGroup) -> None:
        found = [resume_from or (newest_checkpoint(directory) if self.rank == 0 else None)]
        dist.broadcast_object_list(found, group=group)
        if found[0] is None:
            return
        model = self.config.model.model_dump(mode="json")
        record = restore(found[0], self.model, self.optimizer.optimizer, group, expected_model=model)
        self.progress = Progress(**{key: record[key] for key in asdict(Progress())})
        self.checkpointer.last_saved = found[0]  # an attempt may have died between the last save and the result
        self._say(f"resumed from {found[0]}: {self.progress.step} steps, {self.progress.tokens:,} tokens")

    def run(self) -> dict[str, Any]:
        """Train to the last step; the result that result.json holds (rank 0's; others get the same figures).

        Raises:
            NonFiniteLossError: the loss or the gradient norm became NaN or infinite.
            SupersededError: a newer attempt took the run over.
            StorageError: the last checkpoint could not be written.
        """
        train = self.config.train
        record: dict[str, Any] = {}
        try:
            while self.progress.step < train.steps:
                record = self._step()
                done = self.progress.step
                last = done == train.steps
                due = train.evaluate_every_steps is not None and done % train.evaluate_every_steps == 0
                if last or due:
                    record["heldout_loss"] = self.heldout().loss
                if failed := self.checkpointer.new_failures():
                    record["failed_saves"] = [str(error) for error in failed]
                self._report(record, last=last)
                if last or done % self.config.checkpoint.every_steps == 0:
                    self._save()
            self.checkpointer.wait()
        finally:
            self.close()
        # What is exported is the last checkpoint: an older one would pass for it.
        if self.checkpointer.failures and self.checkpointer.last_saved_step != self.progress.step:
            raise self.checkpointer.failures[-1]
        return self._result(record)

    def close(self) -> None:
        """Finish the save in flight and close the files; `run` does it by itself."""
        try:
            self.checkpointer.close()
        finally:
            if self.metrics is not None:
                self.metrics.close()

    def _step(self) -> dict[str, Any]:
        """One optimizer step over this rank's share of the batch."""
        train, started = self.config.train, time.perf_counter()
        step = self.progress.step
        set_learning_rate(self.optimizer.optimizer, rate := learning_rate(train, step))
        micro_batches = self._micro_batches(self.progress.position)
        valid = sum(int((targets != IGNORE_INDEX).sum()) for _, targets in micro_batches)
        valid_mtp = sum(int((mtp_targets(targets) != IGNORE_INDEX).sum()) for _, targets in micro_batches)
        # The loss is divided by the tokens of the whole optimizer step, so that accumulation and ranks change nothing.
        counts = self._sum_over_ranks(torch.tensor([valid, valid_mtp], dtype=torch.float64))
        tokens, tokens_mtp = max(1.0, float(counts[0])), max(1.0, float(counts[1]))
        parts = len(micro_batches) * self.ranks
        sums = torch.zeros(3, dtype=torch.float64, device=self.device)
        for tokens_BT, targets_BT in micro_batches:
            loss, mtp_loss, balance = self.network(tokens_BT.to(self.device), targets_BT.to(self.device))
            total = loss / tokens + train.mtp_loss_weight * mtp_loss / tokens_mtp
            (total + train.balance_loss_weight * balance / parts).backward()
            sums += torch.stack([loss.detach(), mtp_loss.detach(), balance.detach()]).double()
        norm = float(clip_gradients(self.network, train.max_grad_norm))
        sums = self._sum_over_ranks(sums)
        loss_mean = float(sums[0]) / tokens
        if not (math.isfinite(loss_mean) and math.isfinite(norm)):
            raise NonFiniteLossError(
                f"step {step + 1}: loss {loss_mean}, gradient norm {norm}. The last committed checkpoint is whole. "
                "Lower train.learning_rate, raise train.warmup_steps, or look at the data of this step."
            )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        load_LE = update_expert_bias(self.model.moe_layers(), train.expert_bias_update_rate).cpu()
        seconds = time.perf_counter() - started
        batch_tokens = train.batch_size * self.config.data.sequence_length
        self.progress.step += 1
        self.progress.position += train.batch_size
        self.progress.tokens += batch_tokens
        self.progress.seconds += seconds
        return {
            "step": self.progress.step,
            "steps": train.steps,
            "loss": loss_mean,
            "mtp_loss": float(sums[1]) / tokens_mtp,
            "balance_loss": float(sums[2]) / parts,
            "grad_norm": norm,
            "learning_rate": rate,
            "tokens_per_second": batch_tokens / seconds,
            "mfu": self._mfu(batch_tokens / seconds),
            "mfu_convention": MFU_CONVENTION,
            **_load(load_LE, whole=self.progress.step % _LOAD_EVERY_STEPS == 0 or self.progress.step == train.steps),
            "step_seconds": seconds,
            "seconds_left": self.progress.seconds / self.progress.step * (train.steps - self.progress.step),
            "tokens": self.progress.tokens,
            "time": time.time(),
        }

    def _micro_batches(self, position: int) -> list[tuple[Tensor, Tensor]]:
        """(tokens, targets), each [B, T] int64, of this rank's share of the batch that begins at `position`.

        Targets that bear no loss are IGNORE_INDEX.
        """
        batches = []
        chosen = self.sampler.indices(position, self.rank, self.ranks)
        size = len(chosen) // self.config.train.gradient_accumulation_steps
        for start in range(0, len(chosen), size):
            rows = [self.dataset.sequence(int(i)) for i in chosen[start : start + size]]
            tokens = torch.stack([torch.from_numpy(row[0]) for row in rows])
            bears = torch.stack([torch.from_numpy(row[1]) for row in rows])
            targets = torch.where(bears[:, 1:], tokens[:, 1:], IGNORE_INDEX)
            batches.append((tokens[:, :-1].contiguous(), targets))
        return batches

    def _sum_over_ranks(self, values: Tensor) -> Tensor:
        if self.ranks > 1:
            values = values.to(self.device)
            dist.all_reduce(values)
        return values.cpu()

    def _mfu(self, tokens_per_second: float) -> float:
        per_token = self.config.model.flops_per_token(self.config.data.sequence_length, with_mtp=True)
        return tokens_per_second * per_token / (self.peak_flops * self.ranks)

    def heldout(self) -> Heldout:
        """The held-out loss now, over `train.heldout_sequences` windows' worth of documents, shared by the ranks."""
        self._heldout = evaluate_heldout(self.model, self.network, self.config, self.run_directory, self.device)
        return self._heldout

    def _report(self, record: dict[str, Any], *, last: bool) -> None:
        if self.metrics is None:
            return
        due = self.progress.step % self.config.train.log_every_steps == 0
        if last or due or not record.keys().isdisjoint(("heldout_loss", "failed_saves")):
            self.metrics.write(record)
            self._say(format_line(record))
        if failure := self.metrics.new_failure():
            self._say(f"metrics wait in memory, training goes on: {failure}")
        for failure in record.get("failed_saves", ()):
            self._say(f"checkpoint not saved, training goes on: {failure}")

    def _save(self) -> None:
        record = {
            **asdict(self.progress),
            "world_size": self.ranks,
            **identity(self.config, self.dataset.manifest),
            "model": self.config.model.model_dump(mode="json"),
        }
        self.checkpointer.save(self.progress.step, self.model, self.optimizer.optimizer, record)

    def _result(self, last: dict[str, Any]) -> dict[str, Any]:
        heldout = self._heldout or self.heldout()  # evaluated at the last step, but not when there was none left
        first = self.metrics.first_loss if self.metrics is not None else None
        result = {
            "steps": self.progress.step,
            "loss_first": first,
            "loss_last": last["loss"] if last else self.metrics.last_loss if self.metrics is not None else None,
            "heldout_loss": heldout.loss,
            "heldout_bits_per_byte": heldout.bits_per_byte,
            "tokens": self.progress.tokens,
            "seconds": self.progress.seconds,
            "tokens_per_second": self.progress.tokens / max(self.progress.seconds, 1e-9),
            "checkpoint": self.checkpointer.last_saved,
            "parameters": self.config.model.parameters(with_mtp=True),
            "world_size": self.ranks,
            "device": torch.cuda.get_device_name() if self.device.type == "cuda" else f"cpu, {os.cpu_count()} cores",
            "failed_saves": [str(error) for error in self.checkpointer.failures],
            "versions": {"torch": torch.__version__},
        }
        if self.rank == 0:
            storage.write_json(storage.join(self.run_directory, "train", "result.json"), result)
        return result

    def _say(self, line: str) -> None:
        """A line for people, from the main process alone: on stdout, which a flow relays, and in its log."""
        if self.accelerator.is_main_process:
            print(line, flush=True)
        logger.info(line)


def _wrap_blocks(model: DeepseekV3) -> None:
    """Recompute each block in the backward pass: its name and type stay, so sharding and checkpoints see no change."""
    from torch.utils.checkpoint import checkpoint

    for module in model.modules():
        if isinstance(module, Block):
            forward = module.forward
            module.forward = lambda *a, _forward=forward: checkpoint(_forward, *a, use_reentrant=False)  # type: ignore[method-assign]


def _load(load_LE: Tensor, *, whole: bool) -> dict[str, Any]:
    """Expert load: the worst layer's max over mean, and now and then every expert's share."""
    if not load_LE.numel():
        return {"expert_load_max_over_mean": 1.0}
    share_LE = load_LE / load_LE.sum(dim=1, keepdim=True).clamp(min=1.0)
    figures: dict[str, Any] = {"expert_load_max_over_mean": float((share_LE.amax(1) / share_LE.mean(1)).max())}
    if whole:
        figures["expert_load"] = [[round(value, 5) for value in row] for row in share_LE.tolist()]
    return figures
