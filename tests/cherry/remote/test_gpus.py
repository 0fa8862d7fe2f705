"""State of GPUs: what counts as in use and as a fault, in words. tests/cherry/remote/test_gpus_gpu.py asks a driver."""

from __future__ import annotations

from types import SimpleNamespace

import pynvml
import pytest

from cherry.remote.gpus import GpuFacts, collect_gpus

GIB = 2**30


def gpu(**changes):
    values = {
        "index": 3,
        "name": "NVIDIA H200",
        "memory_bytes": 141 * GIB,
        "used_bytes": 4 << 20,
        "processes": 0,
        "uncorrected_ecc_errors": 0,
        "remap_pending": False,
        "remap_failed": False,
        "recovery": None,
    }
    return GpuFacts(**{**values, **changes})


def test_a_gpu_is_in_use_by_its_processes_or_its_memory():
    assert not gpu().is_busy
    assert gpu(processes=1).is_busy
    # In a container NVML lists no process of another one.
    assert gpu(processes=None, used_bytes=40 * GIB).is_busy
    assert gpu(processes=2, used_bytes=40 * GIB).use() == "GPU 3 is in use (2 processes, 40.0 GiB)"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"recovery": "reset the GPU"}, "its driver asks to reset the GPU"),
        ({"remap_failed": True, "remap_pending": True}, "cannot remap; have it replaced"),
        ({"remap_pending": True}, "run nvidia-smi --gpu-reset -i 3"),
    ],
)
def test_a_fault_says_what_to_do(changes, words):
    (fault,) = gpu(**changes).faults()
    assert fault.startswith("GPU 3 ") and words in fault


def test_what_a_driver_does_not_tell_is_no_fault():
    silent = dict.fromkeys(["processes", "uncorrected_ecc_errors", "remap_pending", "remap_failed", "recovery"])
    assert list(gpu(**silent).faults()) == []
    assert not GpuFacts(index=0, name="x").is_busy
    assert list(gpu(uncorrected_ecc_errors=2).faults()) == [], "its rows were remapped since"


def test_of_a_driver_s_gpus_each_is_told_also_one_that_is_lost(monkeypatch):
    """A driver's answers stand in for it; an old one knows neither remapped rows nor recovery actions."""

    def unknown(*_: object) -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)

    def handle(index: int) -> int:
        if index == 1:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST)
        return index

    reset = SimpleNamespace(
        nvmlReturn=pynvml.NVML_SUCCESS, value=SimpleNamespace(uiVal=pynvml.NVML_GPU_RECOVERY_ACTION_GPU_RESET)
    )
    answers = {
        "nvmlInit": lambda: None,
        "nvmlShutdown": lambda: None,
        "nvmlSystemGetDriverVersion": lambda: "570.1",
        "nvmlDeviceGetCount": lambda: 3,
        "nvmlDeviceGetHandleByIndex": handle,
        "nvmlDeviceGetName": lambda _: "NVIDIA H200",
        "nvmlDeviceGetMemoryInfo": lambda _, version=None: SimpleNamespace(total=141 * GIB, used=3 << 20),
        "nvmlDeviceGetComputeRunningProcesses": lambda device: [1] * device,
        "nvmlDeviceGetTotalEccErrors": unknown,
        "nvmlDeviceGetRemappedRows": unknown,
        "nvmlDeviceGetFieldValues": lambda device, _: [reset] if device == 2 else unknown(),
    }
    for name, answer in answers.items():
        monkeypatch.setattr(pynvml, name, answer)
    driver, gpus = collect_gpus()
    assert driver == "570.1"
    assert gpus is not None and [gpu.index for gpu in gpus] == [0, 1, 2]
    assert (gpus[0].processes, gpus[0].remap_failed, gpus[0].recovery) == (0, None, None)
    assert [len(list(gpu.faults())) for gpu in gpus] == [0, 1, 1]
    assert "asks to reset the GPU or reboot the host (GPU is lost)" in next(gpus[1].faults())
    assert gpus[2].recovery == "reset the GPU" and gpus[2].is_busy
