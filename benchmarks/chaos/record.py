"""Faults as they were met, and the tables made of them.

    python -m benchmarks.chaos.record benchmarks/results/chaos.json

prints a file of rows as the table of docs/chaos.md.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

COLUMNS = (
    *("fault", "provider", "injected", "completed", "losses_equal", "data_lost", "steps_repeated_max", "survivors"),
    *("detect_s_p50", "detect_s_max", "recover_s_p50"),
)


@dataclass
class Fault:
    """One injected fault. What is not known yet, or does not apply, is `None`."""

    fault: str
    provider: str
    completed: bool = False
    """Whether the job that it was injected into ended well."""
    losses_equal: bool | None = None
    """Whether all of the job's losses equal those of an unbroken job, bit for bit."""
    data_lost: bool = False
    """Whether a committed checkpoint was not resumed from, or a step is missing or twice in the record."""
    steps_repeated: int | None = None
    """Steps that had been done after the checkpoint that was resumed."""
    survivors: int = 0
    """Processes of the old attempt that lived when the next one began, or after the job's end."""
    detect_s: float | None = None
    """Seconds from the fault to the moment that the job was known to have failed."""
    recover_s: float | None = None
    """Seconds from the fault to the next new step."""

    @property
    def survived(self) -> bool:
        return self.completed and self.losses_equal is not False and not self.data_lost and not self.survivors


def rows(faults: Iterable[Fault]) -> list[dict[str, Any]]:
    """One row for each kind of fault and provider, in the order in which they came."""
    groups: dict[tuple[str, str], list[Fault]] = {}
    for one in faults:
        groups.setdefault((one.fault, one.provider), []).append(one)
    return [_row(*names, found) for names, found in groups.items()]


def _row(fault: str, provider: str, found: Sequence[Fault]) -> dict[str, Any]:
    equal = [one.losses_equal for one in found if one.losses_equal is not None]
    detect = [one.detect_s for one in found if one.detect_s is not None]
    recover = [one.recover_s for one in found if one.recover_s is not None]
    repeated = [one.steps_repeated for one in found if one.steps_repeated is not None]
    return {
        "fault": fault,
        "provider": provider,
        "injected": len(found),
        "completed": sum(one.completed for one in found),
        "losses_equal": sum(equal) if equal else None,
        "data_lost": sum(one.data_lost for one in found),
        "steps_repeated_max": max(repeated, default=None),
        "survivors": sum(one.survivors for one in found),
        "detect_s_p50": round(statistics.median(detect), 1) if detect else None,
        "detect_s_max": round(max(detect), 1) if detect else None,
        "recover_s_p50": round(statistics.median(recover), 1) if recover else None,
    }


def table(found: Sequence[dict[str, Any]]) -> str:
    """The rows as text, in columns; what does not apply is a dash."""
    lines = [COLUMNS, *(tuple("-" if row[name] is None else str(row[name]) for name in COLUMNS) for row in found)]
    widths = [max(len(line[place]) for line in lines) for place in range(len(COLUMNS))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def markdown(found: Sequence[dict[str, Any]]) -> str:
    """The rows as a table of a document, with their sums; what does not apply is a dash."""
    lines = [COLUMNS, ("---", "---", *["--:"] * (len(COLUMNS) - 2))]
    lines += [tuple("-" if row[name] is None else str(row[name]) for name in COLUMNS) for row in found]
    summed = {"injected", "completed", "losses_equal", "data_lost", "survivors"}
    total = {name: sum(row[name] or 0 for row in found) if name in summed else "" for name in COLUMNS}
    lines.append(tuple(str(value) for value in (total | {"fault": "all"}).values()))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    print(markdown(json.loads(Path(sys.argv[1]).read_text())))
