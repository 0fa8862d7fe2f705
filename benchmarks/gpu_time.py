"""Where a GPU's time goes in a training step: communication that nothing hides, and nothing at all."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

# Names of what moves data between ranks: NCCL's kernels, copies between GPUs, and the barriers around these.
_COMMUNICATION = ("nccl", "Memcpy PtoP", "barrier_kernel")

Spans = list[tuple[int, int]]
"""Begin and end of each, in nanoseconds."""


class GpuTime(NamedTuple):
    """Milliseconds of a step."""

    exposed_comm_ms: float
    """Communication while no other kernel runs."""
    idle_ms: float
    """Nothing runs."""


def profiled(step: Callable[[], object], steps: int) -> GpuTime:
    """Runs `step` so many times under the profiler of GPU work."""
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(steps):
            step()
        torch.cuda.synchronize()
    results = profile.profiler.kineto_results  # type: ignore[union-attr]
    events = [event for event in results.events() if event.device_type() == torch.autograd.DeviceType.CUDA]
    spans = [(event.name(), (event.start_ns(), event.start_ns() + event.duration_ns())) for event in events]
    return gpu_time(spans, steps)


def gpu_time(spans: list[tuple[str, tuple[int, int]]], steps: int) -> GpuTime:
    """What kernels by name leave of the time from the first to the last, a step."""
    whole = _length(_union([span for _, span in spans]))
    other = _length(_union([span for name, span in spans if not any(part in name for part in _COMMUNICATION)]))
    first, last = min(span[0] for _, span in spans), max(span[1] for _, span in spans)
    return GpuTime(*(round(value / steps / 1e6, 2) for value in (whole - other, last - first - whole)))


def _union(spans: Spans) -> Spans:
    """The same time in spans that do not touch."""
    joined: Spans = []
    for begin, end in sorted(spans):
        if joined and begin <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        else:
            joined.append((begin, end))
    return joined


def _length(spans: Spans) -> int:
    return sum(end - begin for begin, end in spans)
