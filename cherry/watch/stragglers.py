"""Stragglers: ranks that compute longer than the others, who wait for them in every step.

The time that counts is a rank's own, without waiting: the wall time of a step is the same on all ranks. Any rank is
slow now and then, and all are where other programs take the processors. So a rank is named once it was slower in each
of its last reports than the median rank was in any of them, and until it has kept up in as many.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from base.json_lines import append_json, as_record
from cherry.watch.rank_report import RankReport

STRAGGLERS_FILE = "stragglers.jsonl"
"""File in `train/` of the run directory: a line for each time that the ranks were compared."""
_REPORTS = 3


@dataclass(frozen=True)
class Straggler:
    """A rank that is slower than the median rank."""

    rank: int
    host: str
    own_seconds: float
    """Time a step that it computed for itself."""
    excess: float
    """Its time over the median rank's, minus one."""

    @property
    def text(self) -> str:
        """A phrase for people."""
        return f"rank {self.rank} on {self.host} computes {self.excess:.0%} longer than the median rank"


@dataclass(frozen=True)
class Comparison:
    """One comparison of the ranks."""

    step: int
    time: float
    slowest: Straggler
    stragglers: tuple[Straggler, ...]
    """Those that are named."""
    news: tuple[str, ...]
    """Sentences on those that are named since this comparison, and on those that no longer are."""

    def append_to(self, directory: Path) -> None:
        """Append it to stragglers.jsonl in `train/` of the run directory, as far as storage takes it."""
        append_json(directory / STRAGGLERS_FILE, asdict(self))


class Stragglers:
    """Compares the ranks' reports with each other.

    Args:
        share: by how much a rank must be slower than the median rank, as a fraction of that one's time.
    """

    def __init__(self, share: float) -> None:
        self._share = share
        self._compared_at: dict[int, float] = {}
        self._usual: deque[float] = deque(maxlen=_REPORTS)
        self._own: dict[int, deque[float]] = {}
        self._kept_up: dict[int, int] = {}
        self._named: dict[int, Straggler] = {}

    def compare(self, reports: Sequence[RankReport], ranks: int) -> Comparison | None:
        """The comparison, once every rank has a report that was not compared yet; else `None`.

        Args:
            reports: the newest one of each rank.
            ranks: number of ranks of the job.
        """
        own = {report.rank: report.own_seconds for report in reports if report.own_seconds is not None}
        fresh = all(report.time > self._compared_at.get(report.rank, 0.0) for report in reports)
        if len(own) < ranks or not fresh:
            return None
        self._compared_at = {report.rank: report.time for report in reports}
        usual = statistics.median_low(own.values())  # of two ranks the faster one is the usual one
        if usual <= 0.0:
            return None
        found = {
            report.rank: Straggler(report.rank, report.host, own[report.rank], own[report.rank] / usual - 1.0)
            for report in reports
        }
        self._usual.append(usual)
        for rank, seconds in own.items():
            self._own.setdefault(rank, deque(maxlen=_REPORTS)).append(seconds)
            self._kept_up[rank] = 0 if found[rank].excess > self._share else self._kept_up.get(rank, 0) + 1
        before = self._named
        self._named = {rank: found[rank] for rank in sorted(found) if self._is_named(rank, before)}
        return Comparison(
            step=max(report.step for report in reports),
            time=max(report.time for report in reports),
            slowest=max(found.values(), key=lambda one: one.excess),
            stragglers=tuple(self._named.values()),
            news=(*self._new(before, reports, usual), *self._gone(before)),
        )

    def _is_named(self, rank: int, before: Mapping[int, Straggler]) -> bool:
        if rank in before:
            return self._kept_up[rank] < _REPORTS
        return len(self._usual) == _REPORTS and min(self._own[rank]) > (1.0 + self._share) * max(self._usual)

    def _new(self, before: Mapping[int, Straggler], reports: Sequence[RankReport], usual: float) -> list[str]:
        """Sentences on new stragglers; a host whose ranks are all slow is named as a whole."""
        new = {rank: one for rank, one in self._named.items() if rank not in before}
        sentences = []
        for host in dict.fromkeys(one.host for one in new.values()):
            slow = [one for one in new.values() if one.host == host]
            of_host = [report.rank for report in reports if report.host == host]
            seconds = statistics.median(one.own_seconds for one in slow)
            figures = f"{seconds:.3g} s a step against {usual:.3g} s"
            if 1 < len(slow) == len(of_host) < len(reports):
                least = min(one.excess for one in slow)
                sentences.append(
                    f"stragglers: all {len(slow)} ranks on {host} compute at least {least:.0%} longer than the median "
                    f"rank ({figures}); the others wait for them"
                )
            else:
                sentences += [f"straggler: {one.text} ({figures}); the others wait for it" for one in slow]
        return sentences

    def _gone(self, before: Mapping[int, Straggler]) -> list[str]:
        return [
            f"rank {rank} on {one.host} is no longer a straggler"
            for rank, one in before.items()
            if rank not in self._named
        ]


def read_comparisons(lines: Iterable[Mapping[str, Any]]) -> list[Comparison]:
    """The comparisons that lines of stragglers.jsonl hold; damaged ones are left out."""
    return [found for line in lines if (found := as_record(Comparison, line)) is not None]
