"""Names and directories of runs. Nothing heavy is imported: a shell's completion reads them too."""

from __future__ import annotations

import difflib
from pathlib import Path

from base.errors import MissingFileError


def run_directories(runs_directory: Path) -> list[Path]:
    """Directories of all runs, newest first; empty when there is none."""
    times: dict[Path, float] = {}
    for config in runs_directory.glob("*/config.yaml"):
        # Those beginning with a dot or an underline are no runs: one that is being removed, a store.
        if not config.parent.name.startswith((".", "_")):
            try:
                times[config.parent] = config.stat().st_mtime
            except OSError:  # removed meanwhile
                continue
    return sorted(times, key=lambda directory: times[directory], reverse=True)


def find_run(runs_directory: Path, name: str) -> Path:
    """The directory of a run.

    Raises:
        MissingFileError: there is no such run; the text names those that are called similarly.
    """
    directories = {directory.name: directory for directory in run_directories(runs_directory)}
    if name in directories:
        return directories[name]
    close = difflib.get_close_matches(name, directories, n=3)
    hint = f"Did you mean {' or '.join(close)}?" if close else "`cherry status` lists the runs."
    raise MissingFileError(f"no run {name!r} in {runs_directory}. {hint}")
