"""`cherry logs`: what the steps of a run, their programs and the ranks of training have written, from its directory.

Ranks on other hosts write to the same directory, on the file system that the hosts share.
"""

from __future__ import annotations

import re
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

from base.errors import ConfigError, MissingFileError
from base.json_lines import older_part
from cherry.watch.rank_report import ranges
from flows.runs.status import is_held
from tasks.lifecycle import STEPS
from tasks.records.events import log_file

_POLL_S = 0.5
# Ranks, and lines that are kept: a file's name and a list have an end.
_MOST = 10**9


def show_logs(
    directory: Path,
    *,
    step: str | None,
    lines: int,
    follow: bool,
    rank: int | None = None,
    write: Callable[[str], None] = print,
) -> None:
    """Write the last lines of each step's log, and with `follow` new ones until nobody works on the run.

    Args:
        step: the only step to show; `None` shows all that have a log.
        lines: last lines of each log.
        rank: the rank of training whose own log is shown instead.

    Raises:
        MissingFileError: the run has no such log.
        ConfigError: a rank of a step that has none.
    """
    logs = _rank_log(directory, rank, step, follow=follow) if rank is not None else _step_logs(directory, step, follow)
    several = len(logs) > 1
    followed = {name: Tail(path) for name, path in logs.items()}
    last = ""
    for name, tail in followed.items():
        last = _write(name, tail.last(lines), write, heading=several, last=last)
    while follow:
        ended = not is_held(directory)  # asked first: what was written before the end is still read
        for name, tail in followed.items():
            last = _write(name, list(tail.new()), write, heading=several, last=last)
        if ended:
            return
        time.sleep(_POLL_S)


def _step_logs(directory: Path, step: str | None, follow: bool) -> dict[str, Path]:
    """Log by step, in the order of the run; those that may still come too, to be followed."""
    if step not in (None, *STEPS):
        raise ConfigError(f"no step is called {step!r}. The steps are {', '.join(STEPS)}.")
    logs = {name: path for name in STEPS if (path := log_file(directory, name)).is_file()}
    if not follow and not logs:
        raise MissingFileError(f"{directory.name} has no logs yet: no step of it has written a line.")
    if step is not None and step not in logs and not follow:
        raise MissingFileError(f"{directory.name} has no log of {step} yet; there are logs of {', '.join(logs)}.")
    wanted = [step] if step is not None else list(STEPS if follow else logs)
    return {name: log_file(directory, name) for name in wanted}


def _rank_log(directory: Path, rank: int, step: str | None, *, follow: bool) -> dict[str, Path]:
    """The log of a rank, alone; one that may still come too, to be followed while the run is worked on."""
    if step not in (None, "train"):
        raise ConfigError(f"--rank is of the step train, which alone has ranks (got --step {step}). Leave one out.")
    path = directory / "train" / f"rank-{min(rank, _MOST)}.log"
    if not path.is_file() and not (follow and is_held(directory)):
        found = (re.fullmatch(r"rank-(\d+)\.log", one.name) for one in path.parent.glob("rank-*.log"))
        ranks = sorted(int(one[1]) for one in found if one is not None)
        there = f"there are logs of the ranks {ranges(ranks)}" if ranks else "its training has not begun"
        raise MissingFileError(f"{directory.name} has no log of rank {rank}; {there}.")
    return {f"rank {rank}": path}


def _write(name: str, lines: list[str], write: Callable[[str], None], *, heading: bool, last: str) -> str:
    """Write lines under the step's name, unless it stands above already; returns the name that stands last."""
    if not lines:
        return last
    if heading and name != last:
        write(f"==> {name} <==")
    for line in lines:
        write(line)
    return name


class Tail:
    """A growing log and what of it was read; a log that was cut or begun anew is read from its start."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0

    def last(self, count: int) -> list[str]:
        """The last `count` lines, of the part before this file too; later calls of `new` go on from here."""
        kept: deque[str] = deque(maxlen=min(count, _MOST))
        if older_part(self._path).is_file():
            kept.extend(older_part(self._path).read_text(encoding="utf-8", errors="replace").splitlines())
        kept.extend(self.new())
        return list(kept)

    def new(self) -> Iterator[str]:
        """Lines that were finished since the last call."""
        try:
            with self._path.open("rb") as handle:
                size = handle.seek(0, 2)
                self._offset = 0 if size < self._offset else self._offset
                handle.seek(self._offset)
                content = handle.read()
        except FileNotFoundError:
            return
        finished = content[: content.rfind(b"\n") + 1]
        self._offset += len(finished)
        yield from finished.decode("utf-8", errors="replace").splitlines()
