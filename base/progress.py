"""Progress of a program, for the one that started it: JSON lines in the file that CHERRY_PROGRESS_FILE names."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from base.json_lines import append_json

PROGRESS_FILE_VARIABLE = "CHERRY_PROGRESS_FILE"
"""Environment variable with the path of the file that progress is appended to; programs of a program inherit it."""


def print_progress(line: str, fraction: float) -> None:
    """Print a line, and report that `fraction` (0 to 1) of the work is done by then; best effort.

    The report holds the line, so that its reader does not show it twice.
    """
    _report(line=line, fraction=fraction)
    print(line, flush=True)


@contextmanager
def busy(what: str) -> Iterator[None]:
    """Context of work without progress that may take long, like an evaluation; reports its begin and its end."""
    _report(busy=what)
    try:
        yield
    finally:
        _report(busy=None)


def report_figures(**figures: float) -> None:
    """Report figures to the program that started this one; best effort. A line that is printed after them takes them on
    their way at once.
    """
    _report(figures=figures)


def _report(**report: object) -> None:
    if path := os.environ.get(PROGRESS_FILE_VARIABLE):
        append_json(Path(path), report)
