"""Progress of a quantization for people: shards, bytes, rate and time left."""

from __future__ import annotations

import time

from base.storage import Progress

_REPORT_SECONDS = 5.0


class Meter:
    """Progress of work on shards of known sizes, reported at every shard's end, and every five seconds between.

    Args:
        sizes: stored bytes of each shard, by file.
        finished: files that an earlier start finished: they count as done, and not into the rate.
    """

    def __init__(self, sizes: dict[str, int], finished: set[str], on_progress: Progress | None) -> None:
        self._sizes, self._on_progress = sizes, on_progress
        self._total = max(1, sum(sizes.values()))
        self._found = sum(sizes[file] for file in finished)
        self._shards = len(finished)
        self._done = 0
        self._parts: dict[str, int] = {}
        self._started = self._reported = time.monotonic()

    def read(self, file: str, count: int) -> None:
        """Count bytes of a shard in work."""
        self._parts[file] = min(self._parts.get(file, 0) + count, self._sizes[file])
        if time.monotonic() - self._reported >= _REPORT_SECONDS:
            self._report("quantizing", self._shards)

    def finish(self, file: str) -> None:
        """Count a shard as finished."""
        self._parts.pop(file, None)
        self._done += self._sizes[file]
        self._shards += 1
        self._report("quantized", self._shards)

    def _report(self, what: str, shards: int) -> None:
        if self._on_progress is None:
            return
        now = self._reported = time.monotonic()
        fresh = self._done + sum(self._parts.values())
        read = self._found + fresh
        rate = fresh / max(now - self._started, 1e-9)
        last = shards == len(self._sizes)
        left = "" if last or not rate else f", {_duration((self._total - read) / rate)} left"
        line = (
            f"{what} {shards}/{len(self._sizes)} shards, {read / 1e9:.3g} of {self._total / 1e9:.3g} GB, "
            f"{rate / 1e9:.2g} GB/s{left}"
        )
        self._on_progress(line, 1.0 if last else min(read / self._total, 0.999))


def _duration(seconds: float) -> str:
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"
