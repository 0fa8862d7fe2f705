"""`cherry top`: a run's training as it goes, by rank and by node, drawn again and again on a terminal.

It reads what the hosts write to the run directory, which they share, and asks none of them.
"""

from __future__ import annotations

import re
import statistics
import time
from collections import deque
from collections.abc import Iterable, Sequence
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from base.json_lines import read_last
from cherry.planner.report import duration
from cherry.watch.node_sampler import NodeSample, read_nodes
from cherry.watch.rank_log import rank_log
from cherry.watch.rank_report import RankReport, read_job
from cherry.watch.stragglers import STRAGGLERS_FILE, read_comparisons
from flows.runs.logs_command import Tail
from flows.runs.status import RunStatus, read_run
from flows.terminal import read_key, without_echo
from tasks.interruptions.position import last_metrics
from tasks.records.events import log_file

_EVERY_S = 2.0
_LOG_LINES = 5
_FEWEST_ROWS = 3
# The ranks' heading, the line on those that are left out, two empty ones, and the last one.
_ROWS_BESIDES = 5
# Three reports by default, and three samples of a node: who is silent for longer is slow, stuck or gone.
_SILENT_S = 30.0
_QUIT_KEYS = ("q", "Q", "\x1b")
_GPU_FIGURE = re.compile(r"gpu_([0-9]{1,6})_")
_STYLE = {"running": "cyan", "waiting": "yellow", "finished": "green", "failed": "bold red", "interrupted": "yellow"}


def show_top(console: Console, runs_directory: Path, name: str, *, once: bool) -> None:
    """Draw the run until q or Ctrl-C is typed, which do not touch the run; once, if wanted or without a terminal.

    Raises:
        MissingFileError: there is no such run.
    """
    view = _View(read_run(runs_directory, name).directory)
    if once or not console.is_terminal or console.is_dumb_terminal:
        console.print(view.draw(read_run(runs_directory, name), rows=None))
        return
    try:
        with without_echo(key_by_key=True), Live(console=console, screen=True, auto_refresh=False) as live:
            while True:
                live.update(view.draw(read_run(runs_directory, name), rows=console.height), refresh=True)
                if read_key(_EVERY_S) in _QUIT_KEYS:
                    return
    except KeyboardInterrupt:
        return


class _View:
    """What is drawn of one run, and the end of its log."""

    def __init__(self, directory: Path) -> None:
        self._train = directory / "train"
        launcher = log_file(directory, "train")
        # A job that cherry-launch started by itself has no log of its launcher.
        self._tail = Tail(launcher if launcher.is_file() else rank_log(self._train, 0))
        self._lines = deque(self._tail.last(_LOG_LINES), maxlen=_LOG_LINES)

    def draw(self, run: RunStatus, *, rows: int | None) -> Group:
        """The drawing, with as many ranks as fit on so many rows; `None` has all of them."""
        self._lines.extend(self._tail.new())
        nodes, reports = read_nodes(self._train), read_job(self._train)
        tables = [_head(run), *filter(None, (_nodes_table(nodes), _gpus_table(nodes)))]
        room = None if rows is None else max(_FEWEST_ROWS, rows - _rows_of(tables) - len(self._lines) - _ROWS_BESIDES)
        parts: list[RenderableType] = [part for table in tables for part in (table, "")]
        parts += [*_ranks(reports, self._train, room), ""]
        parts += [Text(line, no_wrap=True, overflow="ellipsis") for line in self._lines]
        if rows is not None:
            parts += ["", Text("q ends this view; the run goes on", style="dim")]
        return Group(*parts)


def _rows_of(tables: Sequence[Table]) -> int:
    """Rows that tables take, each with an empty one after it."""
    return sum(len(table.rows) + int(table.show_header) + 1 for table in tables)


def _head(run: RunStatus) -> Table:
    """State, step, loss, speed and time left of the run."""
    metrics = last_metrics(run.directory / "train" / "metrics.jsonl")
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("run", f"{escape(run.name)}  [{_STYLE[run.state]}]{run.state}[/]  {run.working_on or ''}")
    if metrics is None:
        table.add_row("training", "no step yet")
        return table
    figures = [f"step {metrics.step}" + (f" of {metrics.steps}" if metrics.steps else "")]
    figures += [f"loss {metrics.loss:.4f}"] if metrics.loss is not None else []
    figures += [f"{metrics.tokens_per_second:,.0f} tokens/s"] if metrics.tokens_per_second else []
    figures += [f"{metrics.step_seconds:.3g} s a step"] if metrics.step_seconds else []
    figures += [f"MFU {metrics.mfu:.1%}"] if metrics.mfu is not None else []
    figures += [f"{duration(metrics.seconds_left)} left"] if run.state == "running" and metrics.seconds_left else []
    table.add_row("training", ", ".join(figures))
    table.add_row("checkpoint", run.checkpoint or "none committed yet")
    return table


def _ranks(reports: Sequence[RankReport], train: Path, rows: int | None) -> list[RenderableType]:
    """The ranks, those first that compute longest where not all fit."""
    if not reports:
        return ["no rank has reported yet"]
    line = read_last(train / STRAGGLERS_FILE, "stragglers", accept=lambda line: bool(read_comparisons([line])))
    slow = set() if line is None else {one.rank for one in read_comparisons([line])[0].stragglers}
    own = [report.own_seconds for report in reports if report.own_seconds is not None]
    usual = statistics.median_low(own) if own else None
    shown = list(reports)
    if rows is not None and len(shown) > rows:
        shown = sorted(shown, key=lambda one: (one.rank not in slow, -(one.own_seconds or 0.0)))[:rows]
    table = Table(box=None, pad_edge=False)
    for heading in ("rank", "node", "step", "step s", "own s", "over median", "seen"):
        table.add_column(heading, justify="left" if heading in ("node", "seen") else "right", no_wrap=True)
    for one in shown:
        over = None if one.own_seconds is None or not usual else one.own_seconds / usual - 1.0
        cells = (
            str(one.rank),
            escape(one.host),
            str(one.step),
            f"{one.step_seconds:.3g}",
            "-" if one.own_seconds is None else f"{one.own_seconds:.3g}",
            "-" if over is None else f"{over:+.0%}",
            _seen(one.time),
        )
        table.add_row(*cells, style="bold red" if one.rank in slow else None)
    left = len(reports) - len(shown)
    return [table, *([Text(f"and {left} more; cherry top --once has all ranks")] if left else [])]


def _nodes_table(nodes: dict[str, NodeSample]) -> Table | None:
    """A row for each node; `None` without any."""
    table = Table(box=None, pad_edge=False)
    for heading in ("node", "CPU", "memory", "net in", "net out", "disk read", "write", "free", "seen"):
        table.add_column(heading, justify="left" if heading in ("node", "seen") else "right", no_wrap=True)
    for node, sample in nodes.items():
        figures = sample.figures
        table.add_row(
            escape(node),
            _figure(figures, "cpu_utilization_percentage", "{:.0f} %"),
            _figure(figures, "system_memory_usage_megabytes", "{:.1f} GB", scale=1e-3),
            *(
                _figure(figures, f"{name}_megabytes_per_second", "{:.1f} MB/s")
                for name in ("network_receive", "network_transmit", "disk_read", "disk_write")
            ),
            _figure(figures, "disk_available_megabytes", "{:.0f} GB", scale=1e-3),
            _seen(sample.time),
        )
    return table if nodes else None


def _gpus_table(nodes: dict[str, NodeSample]) -> Table | None:
    """A row for each GPU; `None` without any."""
    table = Table(box=None, pad_edge=False)
    for heading in ("node", "GPU", "use", "memory", "of", "power", "temperature"):
        table.add_column(heading, justify="left" if heading == "node" else "right", no_wrap=True)
    for node, sample in nodes.items():
        figures = sample.figures
        for gpu in _gpu_numbers(figures):
            table.add_row(
                escape(node),
                str(gpu),
                _figure(figures, f"gpu_{gpu}_utilization_percentage", "{:.0f} %"),
                _figure(figures, f"gpu_{gpu}_memory_usage_megabytes", "{:.1f} GB", scale=1e-3),
                _figure(figures, f"gpu_{gpu}_memory_total_megabytes", "{:.1f} GB", scale=1e-3),
                _figure(figures, f"gpu_{gpu}_power_usage_watts", "{:.0f} W"),
                _figure(figures, f"gpu_{gpu}_temperature_celsius", "{:.0f} °C"),
            )
    return table if table.rows else None


def _gpu_numbers(figures: Iterable[str]) -> list[int]:
    return sorted({int(found[1]) for name in figures if (found := _GPU_FIGURE.match(name))})


def _figure(figures: dict[str, float], name: str, form: str, *, scale: float = 1.0) -> str:
    return form.format(figures[name] * scale) if name in figures else "-"


def _seen(at: float) -> str:
    """How long ago something was heard; marked when that is long."""
    ago = max(0.0, time.time() - at)
    text = f"{duration(ago)} ago"
    return f"[yellow]{text}[/]" if ago > _SILENT_S else text
