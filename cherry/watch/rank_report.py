"""A rank's report: where it is and how long its steps take, for whoever watches the job. The newest one is kept.

Reports lie in `train/ranks/` of the run directory, which all hosts of a job share, or whose files are carried
(cherry/remote/carry.py): they need no collective, which would make the ranks wait for each other.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from base.json_lines import as_record

RANKS_FOLDER = "ranks"
"""Folder in `train/` of the run directory."""
# More than any job's ranks have.
_DIGITS = 10


@dataclass(frozen=True)
class RankReport:
    """Report of one rank on its steps since the report before."""

    rank: int
    ranks: int
    """Ranks of the job."""
    host: str
    step: int
    """Optimizer steps of the run so far."""
    time: float
    """Unix time."""
    step_seconds: float
    """Median wall time of its steps, which is that of all ranks: they wait for each other."""
    own_seconds: float | None
    """Time a step that it computed for itself, without waiting; `None` where it is not measured, as in its first step.
    It is the lower quartile: what another program took of some steps is not the rank's pace."""

    def write(self, directory: Path) -> None:
        """Replace the rank's report before, where `directory` is `train/` of the run directory.

        Raises:
            OSError: it cannot be written.
        """
        path = directory / RANKS_FOLDER / f"{self.rank}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        # Not flushed to the disk: thousands of ranks do this, and a report that is lost is followed by the next.
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(asdict(self)))
        os.replace(temporary, path)


def read_reports(directory: Path, ranks: Iterable[int]) -> list[RankReport]:
    """The newest reports of those ranks that have one, where `directory` is `train/` of the run directory."""
    found = (_read(directory / RANKS_FOLDER / f"{rank}.json") for rank in ranks)
    return [report for report in found if report is not None]


def read_job(directory: Path) -> list[RankReport]:
    """The newest reports of all ranks of the job, by rank; those that an earlier start with more ranks left are not."""
    first = read_reports(directory, [0])
    if not first:
        return []
    # Those that are there, and not as many as a damaged report says.
    names = (path.stem for path in (directory / RANKS_FOLDER).glob("*.json"))
    others = sorted(int(name) for name in names if name.isascii() and name.isdigit() and len(name) < _DIGITS)
    return first + read_reports(directory, (rank for rank in others if 0 < rank < first[0].ranks))


def _read(path: Path) -> RankReport | None:
    try:
        return as_record(RankReport, json.loads(path.read_text()))
    except (OSError, ValueError, RecursionError):  # none yet, or no JSON
        return None


def ranges(numbers: Iterable[int]) -> str:
    """Rising numbers in words, like `0 to 7, 9`."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(str(part[0]) if len(part) == 1 else f"{part[0]} to {part[-1]}" for part in parts)
