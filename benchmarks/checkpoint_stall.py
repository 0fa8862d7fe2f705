"""Measures how long a checkpoint save stalls training: in background, in foreground, and with torch's async_save.

    python -m benchmarks.checkpoint_stall [--size 31m|1b] [--saves N] [--directory DIR] [--output FILE]

Every save is of parameters, AdamW's two moments and random states, written with fsync and digests. `stall_ms` is what
the training thread waits inside a save and before the optimizer's next step; `slowdown_ms` is how much longer steps
during a save are than steps without one (they share cores and memory with it). The first save is reported separately,
because it allocates the buffers. Medians over the other saves; one JSON row.
"""

import argparse
import contextlib
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
import warnings
from datetime import date

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict
from torch.distributed.checkpoint.state_dict_saver import async_save

from cherry.checkpoint.checkpointer import Checkpointer
from cherry.distributed.fsdp_hooks import install
from cherry.job_config import JobConfig
from cherry.optim.expert_bias import update_expert_bias
from cherry.training_model import build
from model.model_config import PRESETS

SIZES = {
    "31m": ({**PRESETS["tiny"], "vocab_size": 16384, "hidden_size": 640, "num_hidden_layers": 6}, 2, 128),
    # DeepSeek-V2-Lite's widths, one dense and one MoE layer.
    "1b": (
        {**PRESETS["16b"], "num_hidden_layers": 2, "rope_scaling": None, "max_position_embeddings": 4096},
        4,
        4096,
    ),
}
WARM_STEPS = 5


class Training:
    """A model and its optimizer, one timed step at a time."""

    def __init__(self, size: str, device: torch.device) -> None:
        shape, self.batch, self.length = SIZES[size]
        precision = "bf16" if device.type == "cuda" else "fp32"
        train = {"precision": precision, "loss_chunk_tokens": 4096, "learning_rate": 1e-5}
        data = {"tokenizer": "none"}  # nothing is read: the tokens are random
        job = JobConfig.model_validate({"name": "stall", "model": shape, "train": train, "data": data})
        self.config = job.model
        self.network = build(job, device)
        self.network.start(install(self.network.module, job.communication))
        self.model, self.optimizer = self.network.model, self.network.optimizer
        self.tokens = torch.randint(self.config.vocab_size, (self.batch, self.length + 1)).to(device)

    def step(self) -> float:
        """Seconds of one step, device work included."""
        started = time.perf_counter()
        loss, _, _ = self.network.module(self.tokens[:, :-1].contiguous(), self.tokens[:, 1:].contiguous())
        (loss / self.tokens.numel()).backward()
        self.network.step(self.network.gradient_norm(), 1.0)
        self.network.zero_grad()
        update_expert_bias(self.model.moe_layers(), 1e-3)
        loss.item()
        return time.perf_counter() - started

    def steps(self, count: int) -> float:
        """Median seconds."""
        return statistics.median(self.step() for _ in range(count))


def saver_of(directory: str, group: dist.ProcessGroup, *, asynchronous: bool) -> Checkpointer:
    return Checkpointer(directory, keep_last=1, asynchronous=asynchronous, group=group, fence=None)


def in_foreground(training: Training, directory: str, group: dist.ProcessGroup, saves: int) -> list[float]:
    saver, seconds = saver_of(directory, group, asynchronous=False), []
    for number in range(saves + 1):
        before = saver.stalled_seconds
        training.network.reshard()
        saver.save(number, training.model, training.optimizer, {"step": number})
        seconds.append(saver.stalled_seconds - before)
        training.step()
    return seconds


def in_background(
    training: Training, directory: str, group: dist.ProcessGroup, saves: int, step_s: float
) -> tuple[list[float], list[float], list[int]]:
    """For each save: seconds that training waited, seconds that it lost in all, and steps that ran during it."""
    saver = saver_of(directory, group, asynchronous=True)
    stalls, losses, beside = [], [], []
    for number in range(saves + 1):
        before, started, steps = saver.stalled_seconds, time.perf_counter(), 0
        training.network.reshard()
        saver.save(number, training.model, training.optimizer, {"step": number})
        while saver.last_saved_step != number and not saver.new_failures():
            training.step()
            steps += 1
        stalls.append(saver.stalled_seconds - before)
        losses.append(time.perf_counter() - started - steps * step_s)
        beside.append(steps)
    saver.close()
    assert not saver.failures, saver.failures
    return stalls, losses, beside


def by_torch(training: Training, directory: str, group: dist.ProcessGroup, saves: int) -> list[float]:
    """Seconds that torch's async_save blocks its caller."""
    seconds = []
    for number in range(saves + 1):
        started = time.perf_counter()
        options = StateDictOptions(flatten_optimizer_state_dict=True)
        training.network.reshard()
        model, optimizer = get_state_dict(training.model, training.optimizer, options=options)
        target = os.path.join(directory, f"torch_{number}")
        pending = async_save({"model": model, "optimizer": optimizer}, checkpoint_id=target, process_group=group)
        seconds.append(time.perf_counter() - started)
        while not pending.done():
            training.step()
        pending.result()
        shutil.rmtree(target)
    return seconds


def measure(size: str, saves: int, directory: str) -> dict:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    training = Training(size, device)
    group = dist.new_group(backend="gloo")
    training.steps(WARM_STEPS)
    step_s = training.steps(10)
    foreground = in_foreground(training, os.path.join(directory, "foreground"), group, saves)
    stalls, losses, beside = in_background(training, os.path.join(directory, "background"), group, saves, step_s)
    theirs = by_torch(training, directory, group, saves)
    whole, stall = statistics.median(foreground[1:]), statistics.median(stalls[1:])
    return {
        "what": f"checkpoint stall, {size}",
        "device": torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {os.cpu_count()} cores",
        "parameters": training.config.parameters(with_mtp=True),
        "step_ms": round(1000 * step_s, 1),
        "foreground_ms": round(1000 * whole, 1),
        "stall_ms": round(1000 * stall, 1),
        "stall_of_foreground": round(stall / whole, 4),
        "stall_ms_each": [round(1000 * value, 1) for value in stalls],
        "slowdown_ms": round(1000 * (statistics.median(losses[1:]) - stall), 1),
        "steps_beside_a_save": statistics.median(beside[1:]),
        "torch_async_save_ms": round(1000 * statistics.median(theirs[1:]), 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(SIZES), default="31m")
    parser.add_argument("--saves", type=int, default=5)
    parser.add_argument("--directory", help="where to write (default: a temporary one)")
    parser.add_argument("--output", help="append the row to this file too")
    options = parser.parse_args()
    cuda = torch.cuda.is_available()
    warnings.filterwarnings("ignore", module="torch.distributed")
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", store=dist.HashStore(), rank=0, world_size=1)
    with contextlib.ExitStack() as stack:
        directory = options.directory or stack.enter_context(tempfile.TemporaryDirectory())
        row = measure(options.size, options.saves, directory)
    row |= {
        "date": date.today().isoformat(),
        "versions": {"torch": torch.__version__, "python": sys.version.split()[0]},
        "command": "python -m benchmarks.checkpoint_stall " + " ".join(sys.argv[1:]),
    }
    print(json.dumps(row), flush=True)
    if options.output:
        with open(options.output, "a") as handle:
            handle.write(json.dumps(row) + "\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
