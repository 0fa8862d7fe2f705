"""Tables of `cherry cluster`: what is taken, the hosts of a check, and the bandwidth between them."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.cells import cell_len
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from base.durations import duration_text
from tasks.clusters.taken import Taken

_HEADINGS = ("name", "provider", "cluster", "hosts", "since", "until", "state")
# A narrower terminal has no room for dates, nor for the provider and its file.
_WIDE_COLUMNS = 100
# Between two columns of a table without lines.
_GAP = 2
_STYLE = {"alive": "green", "gone": "yellow", "overdue": "bold red", "unreadable": "bold red"}


def moment(unix_time: float) -> str:
    """A time of this machine's zone, to the minute."""
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(unix_time))


def show_taken(console: Console, runs_directory: Path, taken: list[Taken], *, as_json: bool) -> None:
    """Print what is taken, a row each; as JSON it is one object with the key `taken`, a list."""
    if as_json:
        print(json.dumps({"taken": [_values(one) for one in taken]}, indent=2))
        return
    if not taken:
        console.print(f"nothing is taken in {runs_directory}", highlight=False, markup=False, soft_wrap=True)
        return
    is_narrow = console.width < _WIDE_COLUMNS
    table = Table(box=None, pad_edge=False)
    for heading in ("name", "hosts", "until", "state") if is_narrow else _HEADINGS:
        table.add_column(heading, no_wrap=heading in ("provider", "since", "until", "state"), overflow="fold")
    for one in taken:
        values = _values(one)
        hosts = ", ".join(one.hosts) or (f"{values['nodes']} asked for" if values["nodes"] else "-")
        name, until = one.name if one.is_kept else f"{one.name} (run)", values["until"]
        cluster = Path(values["cluster"] or "-").name  # its folders are in the JSON
        cells = [name, values["provider"] or "-", cluster, hosts, _away(values["since"]), _when(until)]
        cells = [name, hosts, _away(until)] if is_narrow else cells
        table.add_row(*map(escape, cells), f"[{_STYLE[one.state]}]{one.state}[/]")
    console.print(table)
    for one in taken:
        if one.reason:
            console.print(f"{one.name}: {one.reason}", highlight=False, markup=False, soft_wrap=True)
    if any(one.is_left for one in taken):
        console.print("\nGive back what is overdue or gone: cherry cluster reap", highlight=False, markup=False)


def _when(unix_time: float | None) -> str:
    return "-" if unix_time is None else f"{moment(unix_time)} ({_away(unix_time)})"


def _away(unix_time: float | None) -> str:
    if unix_time is None:
        return "-"
    away = unix_time - time.time()
    return f"in {duration_text(away)}" if away > 0 else f"{duration_text(-away)} ago"


def fitted(headings: Sequence[str], rows: Sequence[Sequence[str]], width: int) -> list[Table]:
    """Tables that hold the columns in turn, each with the first one, so that none is wider than a terminal.

    Args:
        rows: cells in rich's markup, as many as headings.
        width: columns of the terminal. A cell that is longer alone is folded.
    """
    widths = [max(map(cell_len, map(_text, column))) for column in zip(headings, *rows, strict=True)]
    groups, left = [[0]], width - widths[0]
    for place, needed in list(enumerate(widths))[1:]:
        if needed + _GAP > left and len(groups[-1]) > 1:
            groups.append([0])
            left = width - widths[0]
        groups[-1].append(place)
        left -= needed + _GAP
    tables = []
    for group in groups:
        table = Table(box=None, pad_edge=False)
        for place in group:
            table.add_column(headings[place], overflow="fold")
        for row in rows:
            table.add_row(*(row[place] for place in group))
        tables.append(table)
    return tables


def _text(cell: str) -> str:
    return Text.from_markup(cell).plain


def _values(one: Taken) -> dict[str, Any]:
    """JSON values; times are Unix times. Keys are only ever added."""
    asked = one.reservation
    return {
        "name": one.name,
        "directory": str(one.directory.absolute()),
        "kept": one.is_kept,
        "provider": asked and asked.provider,
        "cluster": asked and asked.cluster,
        "nodes": asked and asked.nodes,
        "hosts": list(one.hosts),
        "owner": asked and asked.owner,
        "since": asked and asked.since,
        "until": asked and asked.until,
        "state": one.state,
        "reason": one.reason,
    }
