"""This machine's device for a plan, found without torch: its GPU by the driver's name, or its CPU and its memory."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import psutil

from base.errors import ConfigError
from cherry.hardware import GPUS, Gpu, find_gpu

_GPU_ROOT = Path("/proc/driver/nvidia/gpus")


def local_gpus() -> list[str]:
    """Names of this machine's GPUs, as the driver lists them."""
    if not _GPU_ROOT.is_dir():
        return []
    return [_model_name(folder / "information") for folder in sorted(_GPU_ROOT.iterdir())]


def _model_name(path: Path) -> str:
    lines = path.read_text().splitlines() if path.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("Model:")), "unknown")


def local_device() -> Gpu:
    """Figures of this machine's GPU, or of its CPU.

    Raises:
        ConfigError: a GPU that the planner does not know.
    """
    names = local_gpus()
    if not names:
        return replace(GPUS["laptop"], name="this CPU", memory_bytes=psutil.virtual_memory().total)
    found = find_gpu(names[0])
    if found is None:
        known = ", ".join(name for name, gpu in GPUS.items() if not gpu.shared_memory)
        raise ConfigError(f"no plan for this machine's {names[0]}: known are {known}. Name a cluster's spec instead.")
    return found
