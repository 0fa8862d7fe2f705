"""`cherry status`: all runs as a table, one run in detail, or either as JSON for scripts."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cherry.planner.report import duration
from flows.runs.status import RunStatus, read_run, read_runs, read_values
from tasks.lifecycle import STEPS
from tasks.processes.replicas import ServingDirectory

# A narrower terminal has no room for units, nor for what is served, which `show_all` prints below anyway.
_WIDE_COLUMNS = 100
_STYLE = {"running": "cyan", "waiting": "yellow", "finished": "green", "failed": "bold red", "interrupted": "yellow"}


def show_all(console: Console, runs_directory: Path, *, as_json: bool) -> None:
    """Print all runs, newest first, and what is being served.

    As JSON it is one object with the key `runs`, a list of what `show_one` prints.
    """
    runs = read_runs(runs_directory)
    if as_json:
        print(json.dumps({"runs": [as_values(run) for run in runs]}, indent=2))
        return
    if not runs:
        console.print(f"no runs in {runs_directory}. Next: cherry run configs/tiny.yaml", markup=False)
        return
    table = Table(box=None, pad_edge=False)
    narrow = console.width < _WIDE_COLUMNS
    for heading in ("run", "state", "steps", "verdict", "held-out", "when", "served")[: -1 if narrow else None]:
        table.add_column(heading, no_wrap=heading not in ("run", "steps", "served"), overflow="fold")
    for run in runs:
        unit = "" if narrow else " bits/byte"
        heldout = "-" if run.heldout_bits_per_byte is None else f"{run.heldout_bits_per_byte:.3f}{unit}"
        state, served = f"[{_STYLE[run.state]}]{run.state}[/]", ", ".join(run.served) or "-"
        cells = (escape(run.name), state, steps_done(run), run.verdict or "-", heldout, _age(run), served)
        table.add_row(*cells[: len(table.columns)])
    console.print(table)
    _show_serving(console, runs_directory)


def show_one(console: Console, runs_directory: Path, name: str, *, as_json: bool) -> None:
    """Print one run in detail.

    Raises:
        MissingFileError: there is no such run.
    """
    run = read_run(runs_directory, name)
    if as_json:
        print(json.dumps(as_values(run), indent=2))
        return
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for key, value in _details(run).items():
        table.add_row(key, escape(value))
    console.print(table)


def as_values(run: RunStatus) -> dict[str, Any]:
    """A run's status as JSON values; times are Unix times, durations seconds. Keys are only ever added."""
    return {
        "name": run.name,
        "directory": str(run.directory.absolute()),
        "state": run.state,
        "changed_at": run.changed_at,
        "age_s": max(0.0, time.time() - run.changed_at),
        "finished_steps": run.finished,
        "steps_in_all": len(STEPS),
        "working_on": run.working_on,
        "training": {
            "step": run.step,
            "steps": run.steps_total,
            "loss": run.loss,
            "seconds_left": run.seconds_left,
            "checkpoint": run.checkpoint,
        },
        "changes": list(run.changes),
        "verdict": run.verdict,
        "reason": run.reason,
        "champion_reason": run.champion_reason,
        "heldout_bits_per_byte": run.heldout_bits_per_byte,
        "model": run.model,
        "version": run.version,
        "served": list(run.served),
        "processes": run.processes,
    }


def steps_done(run: RunStatus) -> str:
    """Finished steps in words, like `3 of 8: train 312/400`: how many, and the one at work or the last one."""
    current = run.working_on or next(reversed(run.finished), "")
    training = f" {run.step}/{run.steps_total or '?'}" if current == "train" and run.step is not None else ""
    return f"{len(run.finished)} of {len(STEPS)}" + (f": {current}{training}" if current else "")


def _age(run: RunStatus) -> str:
    return f"{duration(max(0.0, time.time() - run.changed_at))} ago"


def _details(run: RunStatus) -> dict[str, str]:
    training = "-" if run.step is None else f"step {run.step} of {run.steps_total or '?'}"
    if run.loss is not None:
        training += f", loss {run.loss:.3f}"
    if run.state == "running" and run.seconds_left:
        training += f", {duration(run.seconds_left)} left"
    rows = {
        "run": run.name,
        "state": f"{run.state}, {_age(run)}",
        "steps": steps_done(run),
        "training": training,
        "checkpoint": run.checkpoint or "none committed yet",
        "changed": "; ".join(run.changes),
        "memory": _memory(run.directory),
        "held-out": "-" if run.heldout_bits_per_byte is None else f"{run.heldout_bits_per_byte:.3f} bits per byte",
        "verdict": "-" if run.verdict is None else f"{run.verdict}: {run.reason}",
        "version": _version(run),
        "served": ", ".join(run.served) or "-",
        "seconds": ", ".join(f"{step} {seconds:.1f}" for step, seconds in run.finished.items()) or "-",
        "processes": str(run.processes),
        "directory": str(run.directory),
    }
    return {key: value for key, value in rows.items() if value}


def _version(run: RunStatus) -> str:
    if run.version is None:
        return "-"
    why = f", not the champion: {run.champion_reason}" if run.champion_reason else ""
    return f"{run.model} v{run.version}{why}"


def _memory(directory: Path) -> str:
    """Peak memory of a rank as planned and as measured; empty before there is either."""
    planned = read_values(directory / "plan.json").get("predicted_peak_memory_gib")
    measured = read_values(directory / "train" / "result.json").get("peak_memory_gib")
    figures = {"planned": planned, "measured": measured}
    shown = [f"{value:.2f} GiB {name}" for name, value in figures.items() if isinstance(value, int | float)]
    return f"{', '.join(shown)}, at the peak of a rank" if shown else ""


def _show_serving(console: Console, runs_directory: Path) -> None:
    serving = ServingDirectory(str(runs_directory))
    weights, servers = serving.weights(), serving.servers()
    if not servers:
        return
    table = Table(box=None, pad_edge=False)
    for heading in ("\nserving", "\nurl", "\ntraffic", "\nstate"):
        table.add_column(heading, overflow="fold")
    for server in servers:
        traffic = f"{weights[server.name]:g} %" if server.name in weights else "-"
        table.add_row(server.name, server.url or "-", traffic, "up" if server.alive else "[red]gone[/]")
    console.print(table)
