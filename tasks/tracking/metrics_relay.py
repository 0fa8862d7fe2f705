"""Owns the way of training's metrics from the disk to the tracker: from a thread, each step once.

It knows nothing of what trains or of who tracks. An outage or a slow server costs training nothing: metrics.jsonl
has all that was logged, and what could not be sent is sent by a later call.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from base import storage
from base.errors import StorageError
from tasks.tracking.protocol import Tracker

SERIES = (
    "loss",
    "mtp_loss",
    "balance_loss",
    "grad_norm",
    "learning_rate",
    "tokens_per_second",
    "mfu",
    "expert_load_max_over_mean",
    "heldout_loss",
    "step_seconds",
    "skipped_steps",
    "rollbacks",
    "bytes_on_wire_total",
    "reduction_bytes_over_fp32",
)
PARENT_SERIES = ("loss", "heldout_loss", "learning_rate", "grad_norm", "expert_load_max_over_mean")
"""What the flow's own run gets too: enough to see in a comparison of two runs why one is better."""
EVERY_STEP = ("loss", "heldout_loss")
"""What each step sends. Of the others one point a second is enough to see: a point costs more than a line of
metrics.jsonl, and a small model takes ten steps in that time, on the same cores."""
# A step that has one of these is one that a person looks for.
_MARKED = ("heldout_loss", "skipped", "failed_saves")
# The trainer scores windows of some held-out documents, the evaluate step the documents: two figures, two names.
_TRACKED_NAMES = {"heldout_loss": "heldout_window_loss", "heldout_bits_per_byte": "heldout_window_bits_per_byte"}
_POLL_S = 10.0
# Steps in one request, which may hold 1000 metrics (MLflow's limit).
_BATCH_STEPS = 1000 // len(SERIES)


def tracked_name(key: str) -> str:
    """What the tracker calls a figure of training."""
    return _TRACKED_NAMES.get(key, key)


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """The whole lines of a metrics stream; one that is still being written is left out."""
    if not path.exists():
        return
    for line in path.read_text().split("\n")[:-1]:
        yield json.loads(line)


class MetricsRelay:
    """Sends new lines of metrics.jsonl to the tracker until it is left.

    The last step that a run was sent is kept beside the stream: neither a retry nor a later call sends a step twice.
    Steps that training takes again after a rollback are new ones.
    """

    def __init__(self, folder: Path, tracker: Tracker, run_id: str | None, series: Sequence[str] = SERIES) -> None:
        self._metrics = folder / "metrics.jsonl"
        self._mark = folder / f"tracked_step.{run_id}"
        self._tracker = tracker
        self._run_id = run_id
        self._series = series
        self._offset = 0
        self._second = 0  # of the last line that was read
        self._waiting: list[tuple[dict[str, Any], Sequence[str]]] = []  # lines, each with what of it is sent
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="metrics-relay", daemon=True)

    def __enter__(self) -> MetricsRelay:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _follow(self) -> None:
        ended = False
        while not ended:
            ended = self._stop.wait(_POLL_S)
            with suppress(StorageError):  # a full disk keeps the mark from moving, and nothing else
                self.send_new()

    def send_new(self) -> bool:
        """Send the steps that were not sent yet; False when some could not be, which the next call tries again."""
        self._read_new()
        while self._waiting:
            batch = self._waiting[:_BATCH_STEPS]
            points = [
                (tracked_name(key), float(line[key]), int(line["step"]), int(line["time"] * 1000))
                for line, keys in batch
                for key in keys
                if line.get(key) is not None
            ]
            if not self._tracker.points(self._run_id, points):
                return False
            del self._waiting[: len(batch)]
            storage.write_bytes(str(self._mark), "{} {}".format(*_place(batch[-1][0])).encode())
        return True

    def _read_new(self) -> None:
        """Take in the lines behind the offset; from the beginning when a resume rewrote the file."""
        if not self._metrics.exists():
            return
        try:
            lines = self._lines_from_offset()
        except ValueError:  # the offset lies within a line: the file was cut and has grown again
            lines = None
        if lines is None or (lines and self._waiting and _place(lines[0]) <= _place(self._waiting[-1][0])):
            self._offset, self._second, self._waiting = 0, 0, []
            lines = self._lines_from_offset() or []
        sent = (0, 0, *map(int, self._mark.read_text().split() if self._mark.exists() else ()))[-2:]
        self._waiting += [(line, keys) for line, keys in self._with_keys(lines) if _place(line) > sent]

    def _with_keys(self, lines: list[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], Sequence[str]]]:
        """Each line with what of it is sent: all of a second's first one, of the last step's and of marked ones."""
        always = [key for key in self._series if key in EVERY_STEP]
        for line in lines:
            second = int(line["time"])
            last = line["step"] == line.get("steps")
            whole = second != self._second or last or not line.keys().isdisjoint(_MARKED)
            self._second = second
            yield line, self._series if whole else always

    def _lines_from_offset(self) -> list[dict[str, Any]] | None:
        """Whole lines behind the offset, which then moves; `None` when the file is shorter than that."""
        with self._metrics.open("rb") as handle:
            if handle.seek(0, 2) < self._offset:
                return None
            handle.seek(self._offset)
            content = handle.read()
        whole = content[: content.rfind(b"\n") + 1]
        lines: list[dict[str, Any]] = [json.loads(line) for line in whole.splitlines()]
        self._offset += len(whole)
        return lines


def _place(line: dict[str, Any]) -> tuple[int, ...]:
    """What grows from line to line: a rollback takes the steps back, and counts."""
    return line.get("rollbacks", 0), line["step"]
