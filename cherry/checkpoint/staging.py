"""Host snapshots of the training state for background saves, in buffers that are reused (pinned on CUDA).

Large tensors are copied while the next forward and backward passes run, which change neither parameters nor optimizer
states; code that does change them calls `Staging.wait_until_copied` first.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

# Smaller tensors (expert biases, step counts, random states) are copied at once: they may change outside of a step.
_SMALL_BYTES = 1 << 16


class Staging:
    """Snapshot buffers of one job. For one save at a time: `begin` invalidates the previous snapshot."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}
        self._copied = threading.Event()
        self._copied.set()
        self._stream: torch.cuda.Stream | None = None
        self._event: torch.cuda.Event | None = None

    def begin(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """Snapshot for `copy`: small tensors copied, large ones by reference. Call it on the training thread."""
        self._copied.clear()
        if torch.cuda.is_available():
            self._stream = self._stream or torch.cuda.Stream()  # type: ignore[no-untyped-call]
            # The copies wait for the work that is queued now, and for nothing that is queued later.
            self._event = torch.cuda.current_stream().record_event()
        snapshot: dict[str, Any] = _map(state, "", _copy_small)
        return snapshot

    def copy(self, snapshot: Mapping[str, Any]) -> dict[str, Any]:
        """State on the CPU, valid until the next `begin`. Call it on the saving thread."""
        try:
            with torch.cuda.stream(self._stream):
                if self._stream is not None and self._event is not None:
                    self._stream.wait_event(self._event)
                staged: dict[str, Any] = _map(snapshot, "", self._copy_large)
                self._event = None if self._stream is None else self._stream.record_event()
        finally:
            self._copied.set()
        if self._event is not None:
            self._event.synchronize()
        return staged

    def wait_until_copied(self) -> None:
        """Wait for the copy before the state is changed: the thread on a CPU, the current stream on a GPU."""
        self._copied.wait()
        if self._event is not None:
            torch.cuda.current_stream().wait_event(self._event)

    def _copy_large(self, key: str, tensor: Tensor) -> Tensor:
        buffer = self._buffers.get(key)
        if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
            buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            self._buffers[key] = buffer
        if tensor.is_cuda:
            buffer.copy_(tensor, non_blocking=True)
        elif tensor.is_contiguous():
            # Not torch's copy: it would give this thread an OpenMP team, which slows down the training thread's (see
            # `_is_single_process` in cherry/checkpoint/checkpointer.py). numpy's also releases the interpreter lock.
            np.copyto(_bytes(buffer), _bytes(tensor))
        else:
            buffer.copy_(tensor)
        return buffer


def _copy_small(_: str, tensor: Tensor) -> Tensor:
    return tensor.clone() if tensor.nbytes <= _SMALL_BYTES else tensor


def _bytes(tensor: Tensor) -> Any:
    return tensor.reshape(-1).view(torch.uint8).numpy()


def _map(value: Any, key: str, function: Callable[[str, Tensor], Tensor]) -> Any:
    """`value` with every local tensor replaced by `function(key path, tensor)`."""
    if isinstance(value, Mapping):
        return {name: _map(item, f"{key}.{name}", function) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_map(item, f"{key}.{place}", function) for place, item in enumerate(value))
    if isinstance(value, DTensor):
        local = function(key, value.to_local().detach())
        # As in torch's own staging: `from_local` would move the copy back to the mesh's device.
        return DTensor(local, value._spec, requires_grad=False)  # type: ignore[no-untyped-call]
    if isinstance(value, Tensor):
        return function(key, value.detach())
    return value
