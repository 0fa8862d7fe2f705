"""Progress of a program, for the one that started it: JSON lines in the file that CHERRY_PROGRESS_FILE names."""

from __future__ import annotations

import os
from pathlib import Path

from base.json_lines import append_json

PROGRESS_FILE_VARIABLE = "CHERRY_PROGRESS_FILE"
"""Environment variable with the path of the file that progress is appended to; programs of a program inherit it."""


def print_progress(line: str, fraction: float) -> None:
    """Print a line, and report that `fraction` (0 to 1) of the work is done by then; best effort.

    The report holds the line, so that its reader does not show it twice.
    """
    if path := os.environ.get(PROGRESS_FILE_VARIABLE):
        append_json(Path(path), {"line": line, "fraction": fraction})
    print(line, flush=True)
