"""Progress of a calibration for people: layers, the rate at which weights are rounded, and the time left."""

from __future__ import annotations

import time
from collections.abc import Mapping

from base.durations import duration_text
from base.storage import Progress
from model.numerics.weight_kinds import layer_of

_REPORT_SECONDS = 5.0


class Pace:
    """Progress of rounding weights of known sizes, reported at every layer's end, and every five seconds between.

    Args:
        sizes: stored bytes of each weight that is rounded, by released name.
        layers: layers that hidden states go through.
        found: layers that an earlier start finished: they count as done, and not into the rate.
    """

    def __init__(self, sizes: Mapping[str, int], layers: int, found: int, on_progress: Progress | None) -> None:
        self._sizes, self._layers, self._on_progress = sizes, layers, on_progress
        self._total = max(1, sum(sizes.values()))
        self._found = sum(size for name, size in sizes.items() if (layer_of(name) or 0) < found)
        self._finished, self._done = found, 0
        self._started = self._reported = time.monotonic()
        if found and on_progress is not None:
            on_progress(f"resumed: {found} of {layers} layers are calibrated", self._fraction())

    def keep(self, name: str) -> None:
        """Count a weight as rounded."""
        self._done += self._sizes.get(name, 0)
        if time.monotonic() - self._reported >= _REPORT_SECONDS:
            self._report(f"calibrating layer {self._finished + 1}/{self._layers}")

    def finish_layer(self) -> None:
        """Count a layer as finished."""
        self._finished += 1
        self._report(f"calibrated layer {self._finished}/{self._layers}")

    def _fraction(self) -> float:
        return 1.0 if self._finished == self._layers else min((self._found + self._done) / self._total, 0.999)

    def _report(self, what: str) -> None:
        if self._on_progress is None:
            return
        now = self._reported = time.monotonic()
        rate = self._done / max(now - self._started, 1e-9)
        line = what
        if rate:
            line += f", {rate / 1e6:.3g} MB/s"
            if self._finished < self._layers:
                line += f", {duration_text((self._total - self._found - self._done) / rate)} left"
        self._on_progress(line, self._fraction())
