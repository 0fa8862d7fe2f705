"""State of this host's GPUs by NVML: what is free, and what the driver says of their health.

NVML keeps no history of Xid errors. What is left of one shows as the action by which the driver wants the GPU
recovered, and as rows of its memory that are to be remapped, or that could not be.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict

# The driver and a desktop may hold some; a training program holds at least its CUDA context, about 500 MB.
_IDLE_BYTES = 400 << 20
_GIB = 2**30
_T = TypeVar("_T")


class GpuFacts(BaseModel):
    """One GPU; `None` is what its driver does not tell."""

    model_config = ConfigDict(frozen=True)

    index: int
    """Its number, as the driver counts."""
    name: str
    memory_bytes: int = 0
    used_bytes: int = 0
    processes: int | None = None
    """Number of processes that compute on it."""
    uncorrected_ecc_errors: int | None = None
    """ECC errors since the driver was loaded that were not corrected."""
    remap_pending: bool | None = None
    """Whether a row of its memory is remapped at the next reset."""
    remap_failed: bool | None = None
    """Whether a row could not be remapped: the GPU has to be replaced."""
    recovery: str | None = None
    """What the driver asks for after an error (an Xid), like `reset the GPU`."""

    @property
    def is_busy(self) -> bool:
        """Whether a program uses it."""
        return bool(self.processes) or self.used_bytes > _IDLE_BYTES

    def faults(self) -> Iterator[str]:
        """Reasons against computing on it, each with what to do."""
        if self.recovery is not None:
            yield f"GPU {self.index} had an error, and its driver asks to {self.recovery}; nvidia-smi -q tells more"
        if self.remap_failed:
            yield f"GPU {self.index} has bad memory that it cannot remap; have it replaced"
        elif self.remap_pending:
            reset = f"nvidia-smi --gpu-reset -i {self.index}"
            yield f"GPU {self.index} has bad memory that it remaps at a reset; run {reset}"

    def use(self) -> str:
        """Who uses it, for a sentence."""
        return f"GPU {self.index} is in use ({self.processes or 'unknown'} processes, {self.used_bytes / _GIB:.1f} GiB)"


def collect_gpus() -> tuple[str | None, tuple[GpuFacts, ...] | None]:
    """Version of the driver, and its GPUs; `None` without a driver, or without nvidia-ml-py (the extra `gpu`)."""
    try:
        import pynvml as nvml
    except ImportError:
        return None, None
    try:
        nvml.nvmlInit()
    except nvml.NVMLError:
        return None, None
    try:
        gpus = tuple(_gpu_or_lost(nvml, index) for index in range(nvml.nvmlDeviceGetCount()))
        return nvml.nvmlSystemGetDriverVersion(), gpus
    except nvml.NVMLError:
        return None, None
    finally:
        nvml.nvmlShutdown()


def _gpu_or_lost(nvml: Any, index: int) -> GpuFacts:
    """A GPU, also one that does not answer, as when it has fallen off the bus."""
    try:
        return _gpu(nvml, index)
    except nvml.NVMLError as error:
        return GpuFacts(index=index, name="unknown", recovery=f"reset the GPU or reboot the host ({error})")


def _gpu(nvml: Any, index: int) -> GpuFacts:
    handle = nvml.nvmlDeviceGetHandleByIndex(index)

    def told(ask: Callable[[], _T]) -> _T | None:
        with suppress(nvml.NVMLError):
            return ask()
        return None

    # The second version of the call leaves out what the driver itself reserves; old drivers have the first alone.
    memory = told(lambda: nvml.nvmlDeviceGetMemoryInfo(handle, version=nvml.nvmlMemory_v2))
    memory = memory or nvml.nvmlDeviceGetMemoryInfo(handle)
    rows = told(lambda: nvml.nvmlDeviceGetRemappedRows(handle))
    errors = told(
        lambda: nvml.nvmlDeviceGetTotalEccErrors(
            handle, nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, nvml.NVML_VOLATILE_ECC
        )
    )
    return GpuFacts(
        index=index,
        name=nvml.nvmlDeviceGetName(handle),
        memory_bytes=memory.total,
        used_bytes=memory.used,
        processes=told(lambda: len(nvml.nvmlDeviceGetComputeRunningProcesses(handle))),
        uncorrected_ecc_errors=errors,
        remap_pending=None if rows is None else bool(rows[2]),
        remap_failed=None if rows is None else bool(rows[3]),
        recovery=told(lambda: _recovery(nvml, handle)),
    )


def _recovery(nvml: Any, handle: Any) -> str | None:
    """What the driver asks for, from version 570 on; `None` for nothing."""
    actions = {
        nvml.NVML_GPU_RECOVERY_ACTION_GPU_RESET: "reset the GPU",
        nvml.NVML_GPU_RECOVERY_ACTION_NODE_REBOOT: "reboot the host",
        nvml.NVML_GPU_RECOVERY_ACTION_DRAIN_P2P: "drain the traffic between GPUs",
        nvml.NVML_GPU_RECOVERY_ACTION_DRAIN_AND_RESET: "drain the host and reset the GPU",
    }
    (field,) = nvml.nvmlDeviceGetFieldValues(handle, [nvml.NVML_FI_DEV_GET_GPU_RECOVERY_ACTION])
    if field.nvmlReturn != nvml.NVML_SUCCESS or field.value.uiVal == nvml.NVML_GPU_RECOVERY_ACTION_NONE:
        return None
    return actions.get(field.value.uiVal, f"take recovery action {field.value.uiVal}")
