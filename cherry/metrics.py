"""Owns what a training run reports: the metrics stream, the line for people, and MFU with its convention.

It knows nothing of how the figures come about.
"""

from __future__ import annotations

import json
import logging
import math
import resource
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from base import storage
from base.errors import CherryError, storage_errors
from cherry.hardware import find_gpu

logger = logging.getLogger(__name__)
MFU_CONVENTION = "causal"
"""Attention counts half of the full square: see ModelConfig.flops_per_token."""


def peak_flops(device: torch.device, precision: str) -> float:
    """FLOP/s that the device can reach: the data sheet's, or a short measured matmul where there is none."""
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
    """The most that this process has held: torch's tensors on a GPU, all of its memory on a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # Linux tells KiB


class MetricsWriter:
    """Appends one JSON object a logged step, whole lines only; a resume drops what lies past its checkpoint.

    Lines that storage does not take wait in memory, and go on the disk with a later one: reporting ends no training.
    """

    def __init__(self, path: Path, *, resume_step: int) -> None:
        self._path = path
        kept = [line for line in _lines(path) if line["step"] <= resume_step] if path.exists() else []
        with storage_errors(str(path)):
            # A new file under the old name: an attempt that was superseded writes on to one without a name.
            storage.write_bytes(str(path), "".join(json.dumps(line) + "\n" for line in kept).encode())
            self._handle = path.open("ab", buffering=0)
        self._waiting = b""
        self._failure: CherryError | None = None
        self._told = False
        losses = [line["loss"] for line in kept if line["loss"] is not None]
        self.first_loss: float | None = losses[0] if losses else None
        self.last_loss: float | None = losses[-1] if losses else None

    def write(self, record: dict[str, Any]) -> None:
        """Append one record; it is on its way to the disk when this returns, unless storage failed.

        What is not finite becomes null.
        """
        record = {key: value if is_finite(value) else None for key, value in record.items()}
        if record["loss"] is not None:
            self.first_loss = record["loss"] if self.first_loss is None else self.first_loss
            self.last_loss = record["loss"]
        self._waiting += (json.dumps(record) + "\n").encode()
        self._flush()

    def new_failure(self) -> CherryError | None:
        """Why lines have begun to wait, once; for a person's eyes."""
        if self._told:
            return None
        self._told = self._failure is not None
        return self._failure

    def close(self) -> None:
        """Close the file; lines that still wait are lost then, and logged as lost."""
        self._flush()
        if self._failure is not None:
            logger.error("%d metrics lines are lost: %s", self._waiting.count(b"\n"), self._failure)
        with suppress(OSError):  # some file systems tell of a full disk only here
            self._handle.close()

    def _flush(self) -> None:
        try:
            with storage_errors(str(self._path)):
                while self._waiting and not self._handle.closed:
                    # A disk that is almost full takes a part: the rest of that line comes first next time.
                    self._waiting = self._waiting[self._handle.write(self._waiting) :]
        except CherryError as error:
            self._failure = error
        else:
            self._failure, self._told = None, False


def is_finite(value: object) -> bool:
    """False for NaN and the infinities, which JSON does not have."""
    return not isinstance(value, float) or math.isfinite(value)


def _lines(path: Path) -> list[dict[str, Any]]:
    lines = []
    for line in path.read_text().splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:
            continue  # cut short by a kill
    return lines


def format_line(record: dict[str, Any]) -> str:
    """One line for people: step, loss, gradient norm, rate, tokens/s, MFU (on a GPU), expert load and the time left.

    Once a step was skipped or the run went back, how often.
    """
    left = int(record["seconds_left"])
    eta = f"{left // 3600}h{left % 3600 // 60:02d}m" if left >= 3600 else f"{left // 60}m{left % 60:02d}s"
    speed = record["tokens_per_second"]
    rate = f"{speed / 1000:.1f}k" if speed >= 1000 else f"{speed:.0f}"
    counts = {"skipped": record.get("skipped_steps"), "rollbacks": record.get("rollbacks")}
    events = "".join(f" {name} {count}" for name, count in counts.items() if count)
    mfu = "" if record["mfu"] is None else f"mfu {100 * record['mfu']:.1f}% ({MFU_CONVENTION}) "
    return (
        f"step {record['step']}/{record['steps']} loss {record['loss']:.3f} grad {record['grad_norm']:.2f} "
        f"lr {record['learning_rate']:.1e} {rate} tok/s {mfu}"
        f"load {record['expert_load_max_over_mean']:.2f} eta {eta}{events}"
    )


def expert_load(load_LE: Tensor, *, whole: bool) -> dict[str, Any]:
    """The worst layer's max over mean of the tokens that chose each expert, and if `whole` every expert's share."""
    if not load_LE.numel():
        return {"expert_load_max_over_mean": 1.0}
    share_LE = load_LE / load_LE.sum(dim=1, keepdim=True).clamp(min=1.0)
    figures: dict[str, Any] = {"expert_load_max_over_mean": float((share_LE.amax(1) / share_LE.mean(1)).max())}
    if whole:
        figures["expert_load"] = [[round(value, 5) for value in row] for row in share_LE.tolist()]
    return figures
