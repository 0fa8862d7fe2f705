"""Stacks of a job that hangs, put together from the logs of its ranks: who waits where, and who is somewhere else."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from datetime import datetime
from pathlib import Path

from cherry.watch.rank_report import ranges

STACKS_FOLDER = "stacks"
"""Folder in `train/` of the run directory, with a file for each hang."""
_NO_STACK = "no stack came: the process is stopped, stuck in a driver, or its host does not answer"
# Python passes signals to the main thread.
_CURRENT = "Current thread "
# What differs between equal stacks: ids of threads.
_THREAD = re.compile(r"^((?:Current thread|Thread) )0x[0-9a-f]+", re.MULTILINE)
# Python writes a thread's stack as this line and indented ones.
_STACK = re.compile(r"^(?:Current thread|Thread) 0x[0-9a-f]+.*\n(?:  .*\n?)*", re.MULTILINE)


def log_sizes(directory: Path) -> dict[int, int]:
    """Bytes of each rank's log, by rank, where `directory` is `train/` of the run directory."""
    found = {}
    for path in directory.glob("rank-*.log"):
        number = path.stem.removeprefix("rank-")
        if number.isdecimal():
            found[int(number)] = path.stat().st_size
    return found


def keep_stacks(directory: Path, before: Mapping[int, int], ranks: int, why: str) -> Path:
    """The file that holds the stacks that ranks have written to their logs since.

    Ranks whose main threads are at the same place stand together, with all threads of the first of them.

    Args:
        directory: `train/` of the run directory.
        before: bytes of each log that are older, by rank.
        ranks: number of ranks of the job.
        why: a sentence for the head of the file.

    Raises:
        OSError: a log cannot be read, or the file not be written.
    """
    groups: dict[str, list[int]] = {}
    texts: dict[str, str] = {}
    for rank in range(ranks):
        stacks = _stacks(directory / f"rank-{rank}.log", before.get(rank, 0))
        place = stacks.partition(_CURRENT)[2]
        groups.setdefault(place, []).append(rank)
        texts.setdefault(place, stacks or f"{_NO_STACK}\n")
    parts = [f"{datetime.now().astimezone().isoformat(timespec='seconds')}: {why}\n"]
    # The fewest first: who is somewhere else keeps the others waiting.
    for place, members in sorted(groups.items(), key=lambda item: (len(item[1]), item[1])):
        parts.append(f"===== {_ranks(members)} =====\n{texts[place]}")
    path = directory / STACKS_FOLDER / f"{datetime.now().strftime('%Y%m%d-%H%M%S')}.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(parts))
    return path


def _stacks(path: Path, offset: int) -> str:
    """Stacks of a log's threads, the main thread's last; empty without any."""
    if not path.exists():
        return ""
    with path.open("rb") as file:
        file.seek(offset)
        text = file.read().decode(errors="replace")
    found = [match[0].rstrip("\n") + "\n" for match in _STACK.finditer(text)]
    return _THREAD.sub(r"\1", "".join(sorted(found, key=lambda stack: stack.startswith(_CURRENT))))


def _ranks(numbers: Iterable[int]) -> str:
    words = ranges(numbers)
    return f"rank {words}" if words.isdecimal() else f"ranks {words}"
