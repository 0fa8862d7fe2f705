"""The relay of training metrics from metrics.jsonl to the tracker, by a thread, each step once.

Best effort: an outage or a slow server costs training nothing. metrics.jsonl has all that was logged, and what could
not be sent is sent by a later call.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Self

from base import storage
from base.errors import StorageError
from base.json_lines import JsonLinesReader, read_lines
from cherry.train_record import EVERY_STEP, METRICS_FILE, SERIES, TrainRecord, read_records
from tasks.tracking.protocol import Point, RunTracker

_POLL_S = 10.0
# Steps in one request, which may hold 1000 metrics (MLflow's limit).
_BATCH_STEPS = 1000 // len(SERIES)


def read_metrics(path: Path) -> list[TrainRecord]:
    """The records of a metrics.jsonl; a line that is still being written is left out."""
    return read_records(read_lines(path))


class Relay(ABC):
    """Calls `poll` on a thread, from entering the context until leaving it, and once more then.

    Args:
        every_s: seconds between two calls.
    """

    def __init__(self, every_s: float) -> None:
        self._every_s = every_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, name=type(self).__name__, daemon=True)

    @abstractmethod
    def poll(self, *, last: bool) -> None:
        """Send what is new; `last` at the end. It raises nothing that the world may bring about."""

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _follow(self) -> None:
        ended = False
        while not ended:
            ended = self._stop.wait(self._every_s)
            self.poll(last=ended)


class MetricsRelay(Relay):
    """Sends new lines of metrics.jsonl to one run of the tracker, from entering the context until leaving it.

    The last step that the run was sent is kept beside the file: neither a retry nor a later call sends a step twice.
    Steps that training takes again after a rollback are new ones.

    Args:
        folder: holds metrics.jsonl.
        series: series name in the tracker by field of `TrainRecord`.
    """

    def __init__(
        self, folder: Path, tracker: RunTracker, run_id: str | None, series: Mapping[str, str] = SERIES
    ) -> None:
        super().__init__(_POLL_S)
        self._reader = JsonLinesReader(folder / METRICS_FILE)
        self._sent_file = folder / f"tracked_step.{run_id}"
        self._tracker = tracker
        self._run_id = run_id
        self._series = series
        self._every_step = {field: name for field, name in series.items() if field in EVERY_STEP}
        self._second = 0  # of the last line that was read
        self._waiting: list[tuple[TrainRecord, Mapping[str, str]]] = []  # each with the series that it sends

    def poll(self, *, last: bool) -> None:
        """See `Relay`."""
        with suppress(StorageError):  # a full disk: the last sent step is not written, and nothing else is lost
            self.send_new()

    def send_new(self) -> bool:
        """Send the steps that were not sent yet; False when some could not be, which the next call tries again."""
        self._read_new()
        while self._waiting:
            batch = self._waiting[:_BATCH_STEPS]
            points = [
                Point(name, value, record.step, int((record.time or 0.0) * 1000))
                for record, series in batch
                for name, value in record.points(series)
            ]
            if not self._tracker.points(self._run_id, points):
                return False
            del self._waiting[: len(batch)]
            storage.write_bytes(str(self._sent_file), "{} {}".format(*batch[-1][0].position).encode())
        return True

    def _read_new(self) -> None:
        """Take in the lines that were written since the last call; from the start when a resume rewrote the file."""
        records = self._new_records()
        if records is None or (records and self._waiting and records[0].position <= self._waiting[-1][0].position):
            self._reader = JsonLinesReader(self._reader.path)
            self._second, self._waiting = 0, []
            records = self._new_records() or []
        stored = self._sent_file.read_text().split() if self._sent_file.exists() else []
        sent = (0, 0, *map(int, stored))[-2:]
        self._waiting += [pair for pair in self._with_series(records) if pair[0].position > sent]

    def _new_records(self) -> list[TrainRecord] | None:
        lines = self._reader.read_new()
        return None if lines is None else read_records(lines)

    def _with_series(self, records: list[TrainRecord]) -> Iterator[tuple[TrainRecord, Mapping[str, str]]]:
        """Each record with the series that it sends: all for a second's first one, the last step and marked ones."""
        for record in records:
            second = int(record.time or 0.0)
            last = record.step == record.steps
            sends_all = second != self._second or last or record.marked
            self._second = second
            yield record, self._series if sends_all else self._every_step
