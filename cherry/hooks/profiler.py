"""Profiles of chosen steps and ranks, as a trainer hook: a Chrome trace of operators, and a history of memory.

Open a trace at https://ui.perfetto.dev, a CUDA memory snapshot at https://docs.pytorch.org/memory_viz.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from cherry.hooks.protocol import TrainerHook
from cherry.train_config import ProfileConfig
from cherry.train_record import TrainRecord

# Allocations and frees that a CUDA snapshot keeps, as in torchtitan's tools/profiling.py.
_MEMORY_EVENTS = 100_000
# What Kineto calls an allocation or a free in a trace.
_MEMORY_EVENT_NAME = "[memory]"


class ProfilerHook(TrainerHook):
    """Profiles this rank from `config.steps[0]` to `config.steps[1]` and writes the recording after the last.

    Files: `rank-<r>-steps-<a>-<b>.trace.json.gz`; with `config.memory` also `....memory.pickle`, a CUDA snapshot with
    the stack of every allocation, or without a GPU `....memory.json.gz`, a list of {time_us, bytes, total_bytes}.

    Args:
        directory: where the files go; it is made when they are written.
        rank: this process, for the files' names.
        print_line: prints a line for people.
    """

    def __init__(self, config: ProfileConfig, directory: Path, *, rank: int, print_line: Callable[[str], None]) -> None:
        self._config = config
        self._directory = directory
        self._rank = rank
        self._print_line = print_line
        self._profile: profile | None = None
        self._range = ExitStack()
        self._steps: list[int] = []

    def on_step_begin(self, step: int) -> None:
        """Start recording at the first step of the range; mark each step in the trace."""
        first, last = self._config.steps
        if self._profile is None and not self._steps and first <= step <= last:
            self._start()
        if self._profile is not None:
            self._steps.append(step)
            self._range.enter_context(record_function(f"step {step}"))

    def on_step_end(self, record: TrainRecord) -> None:
        """Stop and write after the last step of the range."""
        self._range.close()
        if self._profile is not None and record.step >= self._config.steps[1]:
            self._stop()

    def close(self) -> None:
        """Write the recorded steps of a run that ends inside the range."""
        self._range.close()
        if self._profile is not None:
            self._stop()

    def _start(self) -> None:
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
            if self._config.memory:
                torch.cuda.memory._record_memory_history(max_entries=_MEMORY_EVENTS)
        self._profile = profile(activities=activities, profile_memory=self._config.memory)
        self._profile.start()

    def _stop(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # kernels of the last step that are still queued belong to it
        recorded, self._profile = self._profile, None
        assert recorded is not None
        recorded.stop()
        self._directory.mkdir(parents=True, exist_ok=True)
        name = f"rank-{self._rank}-steps-{self._steps[0]}-{self._steps[-1]}"
        trace = self._directory / f"{name}.trace.json.gz"
        recorded.export_chrome_trace(str(trace))
        if self._config.memory:
            self._write_memory(name, trace)
        self._print_line(f"profile of steps {self._steps[0]} to {self._steps[-1]} is in {self._directory}")

    def _write_memory(self, name: str, trace: Path) -> None:
        if torch.cuda.is_available():
            torch.cuda.memory._dump_snapshot(str(self._directory / f"{name}.memory.pickle"))  # type: ignore[no-untyped-call]
            torch.cuda.memory._record_memory_history(enabled=None)
            return
        with gzip.open(trace, "rt") as file:
            events = json.load(file)["traceEvents"]
        timeline = [
            {"time_us": event["ts"], "bytes": event["args"]["Bytes"], "total_bytes": event["args"]["Total Allocated"]}
            for event in events
            if event.get("name") == _MEMORY_EVENT_NAME
        ]
        timeline.sort(key=lambda row: row["time_us"])
        with gzip.open(self._directory / f"{name}.memory.json.gz", "wt") as file:
            json.dump(timeline, file)
