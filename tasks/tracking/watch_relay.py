"""The relay of what is seen of a running job to the tracker: each node's use, stragglers, and stacks of a hang.

The hosts write it to the run directory, which they share; only the flow has to reach the tracker. Best effort, as the
relay of metrics.
"""

from __future__ import annotations

import csv
import statistics
from contextlib import suppress
from pathlib import Path

from base.json_lines import JsonLinesReader, from_the_end
from cherry.train_record import THROUGHPUT
from cherry.watch.node_sampler import NODES_FOLDER, read_samples
from cherry.watch.stacks import STACKS_FOLDER
from cherry.watch.stragglers import STRAGGLERS_FILE, Straggler, read_comparisons
from tasks.tracking.metrics_relay import Relay
from tasks.tracking.protocol import Point, RunTracker

SLOWEST_RANK = f"{THROUGHPUT}/slowest_rank_excess"
"""Series: how much longer the slowest rank computes than the median rank, as a fraction."""
STRAGGLER_TAG = "stragglers"
"""Tag: the ranks that were named, each with its host and by how much it was slower the last time."""
STRAGGLER_TABLE = "stragglers.csv"
"""Artifact: a row for each time that a rank was named."""
# One point a node and figure in so many seconds, their mean: hundreds of nodes have tens of figures each.
_EVERY_S = 30.0
# While the tracker is away; what is older is on disk.
_MOST_WAITING = 20_000


class WatchRelay(Relay):
    """Sends what is new in `train/`, from entering the context until leaving it.

    What lies there already was seen by an earlier attempt.

    Args:
        folder: `train/` of the run directory.
        run_id: the train step's run.
        nodes: whether each node's use is sent.
    """

    def __init__(self, folder: Path, tracker: RunTracker, run_id: str | None, *, nodes: bool) -> None:
        super().__init__(_EVERY_S)
        self._folder, self._tracker, self._run_id, self._nodes = folder, tracker, run_id, nodes
        self._readers = {path: from_the_end(path) for path in self._node_files()}
        self._stragglers = from_the_end(folder / STRAGGLERS_FILE)
        self._seen_stacks = set(self._stacks())
        self._rows: list[tuple[int, float, Straggler]] = []
        self._latest: dict[int, Straggler] = {}
        self._waiting: list[Point] = []

    def poll(self, *, last: bool) -> None:
        """See `Relay`."""
        with suppress(OSError):  # a full disk: the table is not written, and nothing else is lost
            self.send_new(whole=last)

    def send_new(self, *, whole: bool = True) -> None:
        """Send what is new; `whole` writes the table of stragglers too."""
        self._read_nodes()
        self._read_stragglers()
        if self._waiting and self._tracker.points(self._run_id, self._waiting):
            self._waiting = []
        del self._waiting[:-_MOST_WAITING]
        for path in set(self._stacks()) - self._seen_stacks:
            self._seen_stacks.add(path)
            self._tracker.artifact(self._run_id, path, STACKS_FOLDER)
        if whole and self._rows:
            self._tracker.artifact(self._run_id, self._write_table())

    def _node_files(self) -> list[Path]:
        return sorted((self._folder / NODES_FOLDER).glob("*.jsonl")) if self._nodes else []

    def _stacks(self) -> list[Path]:
        return sorted((self._folder / STACKS_FOLDER).glob("*.txt"))

    def _read_nodes(self) -> None:
        for path in self._node_files():
            reader = self._readers.setdefault(path, JsonLinesReader(path))
            lines = reader.read_new()
            if lines is None:  # its file was begun anew
                lines = reader.read_new() or []
            samples = read_samples(lines)
            figures: dict[str, list[float]] = {}
            for sample in samples:
                for name, value in sample.figures.items():
                    figures.setdefault(name, []).append(value)
            for name, values in figures.items():
                series, mean = f"system/{path.stem}/{name}", statistics.fmean(values)
                self._waiting.append(Point(series, mean, samples[-1].number, int(samples[-1].time * 1000)))

    def _read_stragglers(self) -> None:
        found = read_comparisons(self._stragglers.read_new() or [])
        for one in found:
            self._waiting.append(Point(SLOWEST_RANK, one.slowest.excess, one.step, int(one.time * 1000)))
            self._rows += [(one.step, one.time, straggler) for straggler in one.stragglers]
            self._latest |= {straggler.rank: straggler for straggler in one.stragglers}
        if any(one.news for one in found) and self._latest:
            texts = [one.text for _, one in sorted(self._latest.items())]
            self._tracker.log(self._run_id, tags={STRAGGLER_TAG: "; ".join(texts)})

    def _write_table(self) -> Path:
        path = self._folder / STRAGGLER_TABLE
        with path.open("w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(("step", "unix_time", "rank", "host", "own_seconds", "excess"))
            rows.writerows((step, at, one.rank, one.host, one.own_seconds, one.excess) for step, at, one in self._rows)
        return path
