"""This machine's device for a plan: the driver's list of GPUs, or the CPU where there is none."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from base.errors import ConfigError
from cherry.hardware import GPUS
from cherry.planner import local_device


def list_gpus(root: Path, monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Write what the driver writes to /proc for GPUs of these names."""
    monkeypatch.setattr(local_device, "_GPU_ROOT", root)
    for number, name in enumerate(names):
        folder = root / f"0000:{number:02x}:00.0"
        folder.mkdir(parents=True)
        (folder / "information").write_text(f"Model: \t\t {name}\nIRQ:   \t\t 16\nGPU UUID: \t GPU-{number}\n")


def test_a_gpu_is_found_by_the_driver_s_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    list_gpus(tmp_path, monkeypatch, "NVIDIA H200", "NVIDIA H200")
    assert local_device.local_gpus() == ["NVIDIA H200"] * 2
    assert local_device.local_device() == GPUS["H200"]


def test_without_a_driver_it_is_the_cpu_with_this_machine_s_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local_device, "_GPU_ROOT", tmp_path / "none")
    device = local_device.local_device()
    assert local_device.local_gpus() == []
    assert (device.name, device.shared_memory) == ("this CPU", True)
    assert device.memory_bytes == psutil.virtual_memory().total


def test_a_gpu_without_figures_is_an_error_with_those_that_have_some(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    list_gpus(tmp_path, monkeypatch, "NVIDIA GeForce GTX 1080")
    with pytest.raises(ConfigError, match=r"NVIDIA GeForce GTX 1080.*H100.*Name a cluster's spec") as caught:
        local_device.local_device()
    assert "laptop" not in str(caught.value)


def test_a_gpu_that_the_driver_does_not_name_is_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    list_gpus(tmp_path, monkeypatch, "NVIDIA H100 80GB HBM3")
    (tmp_path / "0000:00:00.0" / "information").unlink()
    assert local_device.local_gpus() == ["unknown"]
