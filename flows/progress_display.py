"""The terminal's progress display of a flow: one row a step, with a bar for a step that reports progress.

It reads events.jsonl from the run directory and asks no server.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from base.json_lines import JsonLinesReader
from tasks.steps import EVENTS_FILE

_POLL_S = 0.5
# Without a terminal, a step's progress is printed after this fraction of it, or after these seconds, which a large step
# reaches first.
_PRINTED_FRACTION = 1 / 32
_PRINTED_S = 30.0


class RunProgress:
    """Shows the events of a run directory, by a thread, from entering the context until leaving it.

    On a terminal, steps are rows with bars; elsewhere each event is a line, and progress one line every 3 % or
    30 s.
    """

    def __init__(self, console: Console, run_directory: Path) -> None:
        self._console = console
        events = run_directory / EVENTS_FILE
        self._events = JsonLinesReader(events, events.stat().st_size if events.exists() else 0)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="progress", daemon=True)
        self._rows: dict[str, TaskID] = {}
        self._printed: dict[str, tuple[float, float]] = {}  # by step: fraction and Unix time of the last printed line
        self._progress = Progress(
            TextColumn("{task.fields[mark]} {task.description:<10}"),
            BarColumn(bar_width=24),
            TimeElapsedColumn(),
            # Without markup: a path or a model's answer may hold square brackets.
            TextColumn("{task.fields[line]}", markup=False),
            console=console,
            disable=not console.is_terminal,
        )

    def __enter__(self) -> RunProgress:
        self._progress.start()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._progress.stop()

    def _follow(self) -> None:
        while not self._stop.wait(_POLL_S):
            self._read()
        self._read()

    def _read(self) -> None:
        for event in self._events.read_new() or []:
            self._show(event)

    def _show(self, event: dict[str, Any]) -> None:
        step, kind = str(event["step"]), str(event["event"])
        line = str(event.get("line") or "").split("\n")[0]
        if kind == "reused":
            line = "found finished"
        if not self._console.is_terminal:
            self._print(step, kind, event, line)
            return
        if step not in self._rows:
            self._rows[step] = self._progress.add_task(step, total=None, mark="[cyan]·[/]", line="")
        row = self._rows[step]
        if kind == "progress":
            fraction = event.get("fraction")
            total = None if fraction is None else 1.0
            self._progress.update(row, line=line, total=total, completed=fraction or 0.0)
        elif kind in ("finished", "reused"):
            mark = "[green]✓[/]"
            self._progress.update(row, mark=mark, total=1.0, completed=1.0)
            if line:
                self._progress.update(row, line=line)
            self._progress.stop_task(row)
        elif kind == "failed":
            self._progress.update(row, mark="[red]✗[/]", line=line)
            self._progress.stop_task(row)

    def _print(self, step: str, kind: str, event: dict[str, Any], line: str) -> None:
        fraction = event.get("fraction")
        if kind == "progress" and fraction is not None:
            now = float(event["time"])
            before, printed_at = self._printed.get(step, (fraction + 1.0, now))  # the first is as one that went back
            if before <= fraction < min(1.0, before + _PRINTED_FRACTION) and now - printed_at < _PRINTED_S:
                return
            self._printed[step] = fraction, now
        seconds = f" ({event['seconds']:.1f} s)" if kind == "finished" else ""
        self._console.print(f"{step}: {line or kind}{seconds}", highlight=False, markup=False, soft_wrap=True)
