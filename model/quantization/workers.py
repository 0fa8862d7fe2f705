"""Worker processes of a quantization: shards handed out one at a time, their records, and a worker that dies."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import sysconfig
import threading
from collections import deque
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any

from base.errors import CherryError, WorkerLostError, error_of_record
from model.quantization.plan import Groups

_PACKAGES = Path(__file__).parents[2]
# Temporary tensors of one weight come again for the next: the heap keeps them, where glibc would give each back to the
# system and clear its pages anew. Rounding to 8 bits then takes half of the time, dequantizing a quarter (measured on
# an EPYC, 2026-11-30).
_HEAP = {"MALLOC_MMAP_THRESHOLD_": str(1 << 30), "MALLOC_TRIM_THRESHOLD_": str(1 << 30)}
Event = tuple[str, str, Any]
"""What a worker tells: `read` or `done`, the file, and the bytes or the record."""


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def quantize_in_workers(
    source_uri: str,
    target_uri: str,
    format_name: str,
    plan: Mapping[str, Groups],
    workers: int,
    calibration: Path | None = None,
) -> Generator[Event, None, None]:
    """Events of quantizing all files of `plan`, as they come; the cores are shared out among the workers.

    When the iterator is closed, or raises, all workers have ended.

    Args:
        calibration: work directory of a finished calibration.

    Raises:
        CherryError: a worker's error.
        WorkerLostError: a worker ended without one: it was killed, by the system for its memory, for example.
    """
    threads = max(1, available_cores() // workers)
    command = [sys.executable, "-P", "-m", "model.quantization.worker", source_uri, target_uri, format_name]
    command += [str(threads), *([] if calibration is None else [str(calibration)])]
    jobs, events = deque(plan.items()), queue.Queue[Event | CherryError]()
    running = [_Worker(command, jobs, events) for _ in range(workers)]
    try:
        left = len(plan)
        while left:
            event = events.get()
            if isinstance(event, CherryError):
                raise event
            left -= event[0] == "done"
            yield event
    finally:
        for worker in running:
            worker.end()


class _Worker:
    """One process, and the thread that gives it the next job and passes its answers on."""

    def __init__(
        self, command: list[str], jobs: deque[tuple[str, Groups]], events: queue.Queue[Event | CherryError]
    ) -> None:
        # In a process group of its own, Ctrl-C ends it by this process alone, without a traceback.
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=_environment(), process_group=0
        )
        self._jobs, self._events = jobs, events
        self._ending = False
        self._thread = threading.Thread(target=self._converse, daemon=True)
        self._thread.start()

    def end(self) -> None:
        """End the process, whatever it does."""
        self._ending = True
        self._process.kill()
        self._process.wait()
        self._thread.join()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            try:
                pipe.close()
            except BrokenPipeError:  # what the process had not read
                continue

    def _converse(self) -> None:
        while self._jobs:
            try:
                file, groups = self._jobs.popleft()
            except IndexError:  # another worker took the last one
                return
            if not self._finished(file, groups):
                return

    def _finished(self, file: str, groups: Groups) -> bool:
        """Whether the process quantized a file; an event tells of its end or its error."""
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps({"file": file, "groups": groups}).encode() + b"\n")
            process.stdin.flush()
        except BrokenPipeError:
            pass  # its last answers tell why
        for line in process.stdout:
            if not line.endswith(b"\n"):
                break  # cut short by its end
            [(kind, value)] = json.loads(line).items()
            if kind == "error":
                self._events.put(error_of_record(value) or WorkerLostError(f"{file}: {value}"))
                return False
            self._events.put((kind, file, value))
            if kind == "done":
                return True
        if not self._ending:
            self._events.put(_lost(process.wait(), file))
        return False


def _lost(code: int, file: str) -> CherryError:
    if code < 0:
        return WorkerLostError(
            f"a worker was killed by signal {-code} while it quantized {file}, perhaps for want of memory. Run the "
            "same command again, with fewer --workers if memory is short: finished shards are kept."
        )
    return WorkerLostError(
        f"a worker ended with exit code {code} while it quantized {file}; what it printed stands above. Run the same "
        "command again: finished shards are kept."
    )


def _environment() -> dict[str, str]:
    """The environment of a worker, which finds the packages where this process found them."""
    environment = {**_HEAP, **os.environ}
    if Path(sysconfig.get_path("purelib")) != _PACKAGES:
        paths = filter(None, [str(_PACKAGES), environment.get("PYTHONPATH")])
        environment["PYTHONPATH"] = os.pathsep.join(paths)
    return environment
