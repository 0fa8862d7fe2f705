"""Owns the copy of a training state that a background save is written from: buffers made once, filled beside training.

It knows nothing of files. Large tensors are copied while the next forward and backward passes run, which change no
parameter and no optimizer state; whoever does change them waits first (`Staging.wait_until_copied`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

# Smaller tensors (selection biases, step counts, random states) are copied at once: they may change outside a step.
_SMALL_BYTES = 1 << 16


class Staging:
    """The buffers of one job's saves. One save at a time: `begin` overwrites what the one before was written from."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}
        self._copied = threading.Event()
        self._copied.set()
        self._stream: torch.cuda.Stream | None = None
        self._event: torch.cuda.Event | None = None

    def begin(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """On the training thread: copy small tensors now, and note where the others are, for `copy`."""
        self._copied.clear()
        if torch.cuda.is_available():
            self._stream = self._stream or torch.cuda.Stream()  # type: ignore[no-untyped-call]
            # The copies wait for the work that is queued now, and for nothing that is queued later.
            self._event = torch.cuda.current_stream().record_event()
        snapshot: dict[str, Any] = _map(state, "", _copy_small)
        return snapshot

    def copy(self, snapshot: Mapping[str, Any]) -> dict[str, Any]:
        """On another thread: the state on the CPU, valid until the next `begin`."""
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
        """Before the state is changed: on a CPU until it is copied; on a GPU only the work queued from now on waits."""
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
            # Not torch's copy: it would give this thread an OpenMP team, which slows the training thread's (see
            # `_lone` in cherry/checkpoint/checkpointer.py). This one holds no interpreter lock either.
            np.copyto(_bytes(buffer), _bytes(tensor))
        else:
            buffer.copy_(tensor)
        return buffer


def _copy_small(_: str, tensor: Tensor) -> Tensor:
    return tensor.clone() if tensor.nbytes <= _SMALL_BYTES else tensor


def _bytes(tensor: Tensor) -> Any:
    return tensor.reshape(-1).view(torch.uint8).numpy()


def _map(value: Any, key: str, function: Callable[[str, Tensor], Tensor]) -> Any:
    """`value` with every local tensor replaced by `function(its place, it)`."""
    if isinstance(value, Mapping):
        return {name: _map(item, f"{key}.{name}", function) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_map(item, f"{key}.{place}", function) for place, item in enumerate(value))
    if isinstance(value, DTensor):
        local = function(key, value.to_local().detach())
        # As torch's own staging has it: `from_local` would move the copy back to the mesh's device.
        return DTensor(local, value._spec, requires_grad=False)  # type: ignore[no-untyped-call]
    if isinstance(value, Tensor):
        return function(key, value.detach())
    return value
