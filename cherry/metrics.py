"""Metrics of a training run: the writer of metrics.jsonl, the terminal's line, and the peak FLOP/s of MFU."""

from __future__ import annotations

import json
import logging
import math
import resource
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from base import storage
from base.errors import CherryError, storage_errors
from base.json_lines import as_record, parse_lines
from cherry.distributed.peer_memory import held_bytes
from cherry.hardware import find_gpu
from cherry.train_record import TrainRecord

logger = logging.getLogger(__name__)
MFU_CONVENTION = "causal"
"""Attention counts half of the full square: see ModelConfig.flops_per_token."""
# A host is given up after 20 s at most, and what it wrote comes to the flow's machine every 2 s (cherry/remote/).
_RECENT_S = 60.0
_RECENT_LINES = 200


def peak_flops(device: torch.device, precision: str) -> float:
    """Peak FLOP/s of the device: the data sheet's, or a short measured matmul where there is none."""
    if device.type == "cuda":
        gpu = find_gpu(torch.cuda.get_device_name(device))
        if gpu is not None and precision in gpu.flops:
            return gpu.flops[precision]
    size = 1024
    a = torch.randn(size, size, device=device, dtype=torch.float32 if precision == "fp32" else torch.bfloat16)
    best = 0.0
    for _ in range(6):  # the first warms up; the best of the others is the ceiling
        started = time.perf_counter()
        (a @ a)[0, 0].item()
        best = max(best, 2 * size**3 / (time.perf_counter() - started))
    return best


def peak_memory_bytes(device: torch.device) -> int:
    """Peak allocated bytes: of torch's allocator and of shared memory on a GPU, the resident set on a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device)) + held_bytes()
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # Linux reports KiB


class MetricsWriter:
    """Appends one line a logged step to metrics.jsonl; a resume drops the lines past its checkpoint.

    Best effort: lines that storage does not take wait in memory, and are written with a later one.

    Args:
        saved: lines that the checkpoint keeps, the file's last ones at its time (see `recent`). Those that the file has
            lost since, with the disk of a host or its unwritten buffers, are put back.
    """

    def __init__(self, path: Path, *, resume_step: int, saved: Sequence[str] = ()) -> None:
        self._path = path
        # Lines are kept as they are: they may have keys of another version.
        kept = _up_to(resume_step, path.read_bytes() if path.exists() else b"")
        recent, last = _up_to(resume_step, "".join(saved).encode()), kept[-1][1].step if kept else 0
        kept += [(line, record) for line, record in recent if record.step > last]
        self._recent = deque(((time.monotonic(), json.dumps(line) + "\n") for line, _ in recent), maxlen=_RECENT_LINES)
        with storage_errors(str(path)):
            # A new file under the old name: an attempt that was superseded keeps writing to the unlinked one.
            storage.write_bytes(str(path), "".join(json.dumps(line) + "\n" for line, _ in kept).encode())
            self._handle = path.open("ab", buffering=0)
        self._waiting = b""
        self._failure: CherryError | None = None
        self._failure_taken = False
        losses = [record.loss for _, record in kept if record.loss is not None]
        self.first_loss: float | None = losses[0] if losses else None
        self.last_loss: float | None = losses[-1] if losses else None

    def write(self, record: TrainRecord) -> None:
        """Append one record; it has been handed to the operating system when this returns, unless storage failed."""
        if record.loss is not None and math.isfinite(record.loss):
            self.first_loss = record.loss if self.first_loss is None else self.first_loss
            self.last_loss = record.loss
        line = record.as_line()
        self._recent.append((time.monotonic(), line))
        self._waiting += line.encode()
        self._flush()

    def recent(self) -> list[str]:
        """The lines of the last minute, as a checkpoint keeps them."""
        since = time.monotonic() - _RECENT_S
        return [line for written, line in self._recent if written >= since]

    def new_failure(self) -> CherryError | None:
        """The storage error that made lines wait, the first time that it is asked for; `None` after that."""
        if self._failure_taken:
            return None
        self._failure_taken = self._failure is not None
        return self._failure

    def close(self) -> None:
        """Close the file; lines that still wait are lost, which is an error in the log."""
        self._flush()
        if self._failure is not None:
            logger.error("%d metrics lines are lost: %s", self._waiting.count(b"\n"), self._failure)
        with suppress(OSError):  # some file systems report a full disk only here
            self._handle.close()

    def _flush(self) -> None:
        try:
            with storage_errors(str(self._path)):
                while self._waiting and not self._handle.closed:
                    # An almost full disk takes a part of a line: the next call begins with the rest of it.
                    self._waiting = self._waiting[self._handle.write(self._waiting) :]
        except CherryError as error:
            self._failure = error
        else:
            self._failure, self._failure_taken = None, False


def _up_to(step: int, content: bytes) -> list[tuple[dict[str, Any], TrainRecord]]:
    """(line, record) of the lines of metrics.jsonl up to a step."""
    found = [(line, record) for line in parse_lines(content) if (record := as_record(TrainRecord, line)) is not None]
    return [(line, record) for line, record in found if record.step <= step]


def format_line(record: TrainRecord) -> str:
    """One line for the terminal: step, loss, gradient norm, rate, tokens/s, MFU (on a GPU), expert load, time left.

    Once steps were skipped or the run was rolled back, how often.
    """
    left = int(record.seconds_left or 0.0)
    eta = f"{left // 3600}h{left % 3600 // 60:02d}m" if left >= 3600 else f"{left // 60}m{left % 60:02d}s"
    speed = record.tokens_per_second or 0.0
    rate = f"{speed / 1000:.1f}k" if speed >= 1000 else f"{speed:.0f}"
    counts = {"skipped": record.skipped_steps, "rollbacks": record.rollbacks}
    events = "".join(f" {name} {count}" for name, count in counts.items() if count)
    mfu = "" if record.mfu is None else f"mfu {100 * record.mfu:.1f}% ({MFU_CONVENTION}) "
    return (
        f"step {record.step}/{record.steps} loss {_text(record.loss, '.3f')} grad {_text(record.grad_norm, '.2f')} "
        f"lr {_text(record.learning_rate, '.1e')} {rate} tok/s {mfu}"
        f"load {_text(record.expert_load_max_over_mean, '.2f')} eta {eta}{events}"
    )


def _text(value: float | None, form: str) -> str:
    return "none" if value is None else format(value, form)


def expert_load(load_LE: Tensor, *, whole: bool) -> tuple[float, list[list[float]] | None]:
    """Tokens of the busiest expert over the mean, in the worst layer; if `whole`, all shares by [layer][expert].

    1.0 and `None` without experts.
    """
    if not load_LE.numel():
        return 1.0, None
    share_LE = load_LE / load_LE.sum(dim=1, keepdim=True).clamp(min=1.0)
    worst = float((share_LE.amax(1) / share_LE.mean(1)).max())
    return worst, None if not whole else [[round(value, 5) for value in row] for row in share_LE.tolist()]
