"""The terminal's progress display of a flow: one row a step, with a bar for a step that reports progress.

It reads events.jsonl from the run directory and asks no server.
"""

from __future__ import annotations

import threading
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Column

from base.json_lines import as_record, from_the_end
from flows.terminal import without_echo
from tasks.interruptions.position import where_training_is
from tasks.records.events import EVENTS_FILE, Event

_POLL_S = 0.5
# Without a terminal, a step's progress is printed after this fraction of it, or after these seconds, which a large step
# reaches first.
_PRINTED_FRACTION = 1 / 32
_PRINTED_S = 30.0
_NAME_CHARACTERS = len("provision")
_BAR_CHARACTERS = 24
# Below this width the bar is half as long, so that the text beside it keeps some words.
_WIDE_CHARACTERS = 100


class RunProgress:
    """Shows the events of a run directory, by a thread, from entering the context until leaving it.

    On a terminal, steps are rows with bars; elsewhere, and on one that cannot move its cursor, each event is a line,
    and progress one line every 3 % or 30 s. The error that ends the context is left to who prints it: its step says
    only that it failed, and how far it came.
    """

    def __init__(self, console: Console, run_directory: Path) -> None:
        self._console = console
        self._directory = run_directory
        self._events = from_the_end(run_directory / EVENTS_FILE)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="progress", daemon=True)
        self._rows: dict[str, TaskID] = {}
        self._printed: dict[str, tuple[float, float]] = {}  # by step: fraction and Unix time of the last printed line
        self._failed: dict[str, Any] | None = None
        self._is_live = console.is_terminal and not console.is_dumb_terminal
        self._progress = Progress(*_columns(console.width), console=console, disable=not self._is_live, expand=True)
        self._restoring = ExitStack()

    def __enter__(self) -> RunProgress:
        if self._is_live:
            self._restoring.enter_context(without_echo())
        self._progress.start()
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join()
        if self._failed is not None:
            self._tell_failure(self._failed, is_told_elsewhere=isinstance(error, Exception))
        self._progress.stop()
        self._restoring.close()

    def _follow(self) -> None:
        while not self._stop.wait(_POLL_S):
            self._read()
        self._read()

    def _read(self) -> None:
        for event in self._events.read_new() or []:
            if as_record(Event, event) is not None:
                self._show(event)

    def _show(self, event: dict[str, Any]) -> None:
        failed, self._failed = self._failed, None
        if failed is not None:  # what comes after it, an attempt or another step, says that the flow went on
            self._tell_failure(failed, is_told_elsewhere=False)
        if event["event"] == "failed":
            self._failed = event
            return
        step, kind = str(event["step"]), str(event["event"])
        line = str(event.get("line") or "").split("\n")[0]
        if kind == "reused":
            line = "found finished"
        if self._is_live:
            if event.get("lasting"):  # above the rows, whose text the next line replaces
                self._say(f"{step}: {line}")
            self._update(step, kind, event.get("fraction"), line)
        else:
            self._print(step, kind, event, line)

    def _row(self, step: str) -> TaskID:
        if step not in self._rows:
            self._rows[step] = self._progress.add_task(step, total=None, mark="[cyan]·[/]", line="")
        return self._rows[step]

    def _update(self, step: str, kind: str, fraction: float | None, line: str) -> None:
        row = self._row(step)
        if kind == "started":
            self._progress.update(row, mark="[cyan]·[/]")
        elif kind == "progress":
            total = None if fraction is None else 1.0
            self._progress.update(row, line=line, total=total, completed=fraction or 0.0)
        elif kind in ("finished", "reused"):
            self._progress.update(row, mark="[green]✓[/]", total=1.0, completed=1.0)
            if line:
                self._progress.update(row, line=line)
            self._progress.stop_task(row)

    def _tell_failure(self, event: dict[str, Any], *, is_told_elsewhere: bool) -> None:
        """Show how a step ended: in a word and with its position where its error is printed elsewhere, else in full."""
        step = str(event["step"])
        line = how_it_failed(self._directory, event, with_error=not is_told_elsewhere)
        if self._is_live:
            row = self._row(step)
            self._progress.update(row, mark="[red]✗[/]", line=line)
            self._progress.stop_task(row)
        else:
            self._say(f"{step}: {line}")

    def _print(self, step: str, kind: str, event: dict[str, Any], line: str) -> None:
        fraction = event.get("fraction")
        if kind == "progress" and fraction is not None:
            now = float(event["time"])
            before, printed_at = self._printed.get(step, (fraction + 1.0, now))  # the first is as one that went back
            if before <= fraction < min(1.0, before + _PRINTED_FRACTION) and now - printed_at < _PRINTED_S:
                return
            self._printed[step] = fraction, now
        seconds = f" ({event['seconds']:.1f} s)" if kind == "finished" else ""
        self._say(f"{step}: {line or kind}{seconds}")

    def _say(self, text: str) -> None:
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)


def how_it_failed(run_directory: Path, event: dict[str, Any], *, with_error: bool) -> str:
    """What a `failed` event says to a person: failed or interrupted, how far training came, and the error."""
    line = str(event.get("line") or "").split("\n")[0]
    word = "interrupted" if event.get("interrupted") or line == "interrupted" else "failed"
    if event["step"] == "train" and (position := where_training_is(run_directory)):
        word += f" {position}"
    return f"{word}: {line}" if with_error and line and line != "interrupted" else word


def _columns(width: int) -> list[BarColumn | TextColumn | TimeElapsedColumn]:
    """Columns of which only the text gives way when the terminal is narrow."""
    bar = _BAR_CHARACTERS if width >= _WIDE_CHARACTERS else _BAR_CHARACTERS // 2
    text = Column(ratio=1, no_wrap=True, overflow="ellipsis")
    return [
        TextColumn(
            f"{{task.fields[mark]}} {{task.description:<{_NAME_CHARACTERS}}}",
            table_column=Column(no_wrap=True, min_width=2 + _NAME_CHARACTERS),
        ),
        BarColumn(bar_width=bar, table_column=Column(no_wrap=True, min_width=bar)),
        TimeElapsedColumn(table_column=Column(no_wrap=True, min_width=len("0:00:00"))),
        # Without markup: a path or a model's answer may hold square brackets.
        TextColumn("{task.fields[line]}", markup=False, table_column=text),
    ]
