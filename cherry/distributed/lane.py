"""A stream for communication beside the main one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class Lane:
    """A stream beside the main one, for communication; on a CPU everything is done at once."""

    def __init__(self, device: torch.device) -> None:
        self._stream: torch.cuda.Stream | None = None
        self._given = False
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]

    @contextmanager
    def after_main(self) -> Iterator[None]:
        """Context whose work runs beside the main stream, after what that has been given so far."""
        if self._stream is None:
            yield
            return
        self._given = True
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            yield

    def mark(self) -> Callable[[], None]:
        """Function that makes the main stream wait for what has been given so far, called within `after_main`."""
        if self._stream is None:
            return lambda: None
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(self._stream)
        return lambda: torch.cuda.current_stream().wait_event(event)

    def join(self) -> None:
        """Make the main stream wait for all that was given since the last time."""
        if self._stream is not None and self._given:
            self._given = False
            torch.cuda.current_stream().wait_stream(self._stream)

    def keep(self, tensor: Tensor) -> None:
        """Keep the main stream's memory of a tensor until the work that was given here is done with it."""
        if self._stream is not None:
            tensor.record_stream(self._stream)
