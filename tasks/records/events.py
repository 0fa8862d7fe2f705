"""What a run tells of itself while it goes: its events, which the terminal follows, and the log of each step."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from base.errors import CherryError
from base.json_lines import append_json, append_line, as_record, read_last

EVENTS_FILE = "events.jsonl"
# A step's log and the part before it are not longer than twice this.
_LOG_BYTES = 16 << 20


@dataclass(frozen=True)
class Event:
    """What every line of events.jsonl has, and what those of a failure have besides."""

    step: str
    event: str
    time: float = 0.0
    """Unix time."""
    line: str | None = None
    interrupted: bool = False


def last_event(run_directory: Path, accept: Callable[[Event], bool]) -> Event | None:
    """The newest event that is accepted; `None` without one. Damaged lines are left out."""

    def read(line: dict[str, Any]) -> Event | None:
        event = as_record(Event, line)
        return event if event is not None and accept(event) else None

    found = read_last(run_directory / EVENTS_FILE, "event", accept=lambda line: read(line) is not None)
    return None if found is None else read(found)


def write_event(run_directory: Path, step: str, event: str, **details: Any) -> None:
    """Append an event to events.jsonl, which the terminal's progress display reads; best effort, see `append_json`."""
    append_json(run_directory / EVENTS_FILE, {"time": time.time(), "step": step, "event": event, **details})


def log_file(run_directory: Path, step: str) -> Path:
    """What a step's programs, and the step itself, have written: the newest part, after `base.json_lines.older_part`.

    Training's moves aside with the rest of `train/`.
    """
    return run_directory / "train" / "launcher.log" if step == "train" else run_directory / "logs" / f"{step}.log"


def write_log(run_directory: Path, step: str, line: str) -> None:
    """Append a line to a step's log, which loses its oldest part when it is long."""
    append_line(log_file(run_directory, step), line, most_bytes=_LOG_BYTES)


def line_of(error: BaseException) -> str:
    """What the terminal and the tracker show of an error that ended a step."""
    if isinstance(error, CherryError):
        return str(error)
    # Ctrl-C, a cancellation, a signal: none of them is an error, and their names tell a person nothing.
    return f"{type(error).__name__}: {error}" if isinstance(error, Exception) else "interrupted"


def now() -> str:
    """This second in the local time zone, in ISO 8601."""
    return datetime.now().astimezone().isoformat(timespec="seconds")
