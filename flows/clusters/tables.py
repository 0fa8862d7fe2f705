"""Tables of `cherry cluster`: what is taken, the hosts of a check, and the bandwidth between them."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from base.durations import duration_text
from tasks.clusters.taken import Taken

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
    table = Table(box=None, pad_edge=False)
    for heading in ("name", "provider", "cluster", "hosts", "since", "until", "state"):
        table.add_column(heading, overflow="fold")
    for one in taken:
        values = _values(one)
        hosts = ", ".join(one.hosts) or (f"{values['nodes']} asked for" if values["nodes"] else "-")
        held = [_when(values[key]) for key in ("since", "until")]
        name = one.name if one.is_kept else f"{one.name} (run)"
        cells = [name, values["provider"] or "-", values["cluster"] or "-", hosts, *held]
        table.add_row(*map(escape, cells), f"[{_STYLE[one.state]}]{one.state}[/]")
    console.print(table)
    for one in taken:
        if one.reason:
            console.print(f"{one.name}: {one.reason}", highlight=False, markup=False, soft_wrap=True)
    if any(one.is_left for one in taken):
        console.print("\nGive back what is overdue or gone: cherry cluster reap", highlight=False, markup=False)


def _when(unix_time: float | None) -> str:
    if unix_time is None:
        return "-"
    away = unix_time - time.time()
    return f"{moment(unix_time)} ({'in ' if away > 0 else ''}{duration_text(abs(away))}{'' if away > 0 else ' ago'})"


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
