"""`cherry plan`: memory, speed and cost of a run as tables, JSON or a plot, and an error when it does not fit."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from base.errors import ConfigError, DoesNotFitError, storage_errors
from cherry.cluster import LOCAL, ClusterSpec, read_cluster
from cherry.hardware import GIB
from cherry.planner.local_device import local_device
from cherry.planner.plan import NOT_MODELLED, Plan, RunPlan, make_plan, run_plan
from cherry.planner.report import advice, cost, duration, headline, memory_title, sections_of, unused
from cherry.planner.search import Layout, nearest_that_fit, search
from cherry.planner.step_time import step_time
from tasks.run_config import RunConfig

_BAR_CHARACTERS = 20
_SHOWN_LAYOUTS = 15
_PLOT_FORMATS = (".png", ".svg", ".pdf")


def plan(
    console: Console,
    config: RunConfig,
    cluster: str | None,
    *,
    as_json: bool,
    with_search: bool,
    plot: Path | None = None,
) -> None:
    """Print the plan of a run on a cluster.

    Args:
        cluster: path of a cluster spec, or `local`; `None` takes the config's own.
        with_search: rank the layouts that fit in place of the plan's tables; JSON has both.
        plot: PNG, SVG or PDF file to draw the memory in.

    Raises:
        StorageError: the plot cannot be written.
        MissingFileError, ConfigError: the cluster spec is missing or breaks rules, or cannot hold the run's ranks.
        DoesNotFitError: there is not enough memory; the plan has been printed.
    """
    spec = read_cluster(cluster or config.cluster)
    device = local_device() if spec.kind == LOCAL and spec.gpu is None else None
    made = make_plan(config, spec, device)
    layouts = search(made) if with_search else None
    nearest = [] if made.fits else nearest_that_fit(made)
    if plot is not None:
        _draw(made, plot)
    if as_json:
        document = made.as_dict() | {"nearest": [_plain(layout, config, spec) for layout in nearest]}
        document |= {} if layouts is None else {"layouts": [_plain(layout, config, spec) for layout in layouts]}
        console.print_json(json.dumps(document))
    elif layouts is not None:
        console.print(f"[bold]{made.job}[/] on {headline(made)}", highlight=False)
        _show_layouts(console, layouts, config, spec)
    else:
        _show(console, made)
    if plot is not None and not as_json:
        console.print(f"wrote {plot}", highlight=False, markup=False, soft_wrap=True)
    if not made.fits:
        raise DoesNotFitError(f"{made.why_not()}\n{advice(nearest)}")


def _draw(made: Plan, path: Path) -> None:
    from tasks.plots import plot_memory

    if path.suffix not in _PLOT_FORMATS:
        raise ConfigError(f"--plot: must end with {', '.join(_PLOT_FORMATS)} (got {str(path)!r})")
    with storage_errors(str(path)):
        plot_memory(made.worst.stages, made.worst.usable, path, title=memory_title(made))


def _plain(layout: Layout, config: RunConfig, cluster: ClusterSpec) -> dict[str, object]:
    run = _run(layout, config, cluster)
    return {
        "changes": layout.changes,
        "total_bytes": layout.total_bytes,
        "tokens_per_s_gpu": layout.tokens_per_s_gpu,
        "wall_s": run.wall_s if math.isfinite(run.wall_s) else None,
        "cost": run.cost if run.cost is None or math.isfinite(run.cost) else None,
    }


def _run(layout: Layout, config: RunConfig, cluster: ClusterSpec) -> RunPlan:
    return run_plan(config, cluster, layout.work, step_time(layout.work))


def _show(console: Console, made: Plan) -> None:
    console.print(f"[bold]{made.job}[/] on {headline(made)}", highlight=False)
    if idle := unused(made):
        console.print(f"[yellow]{idle}[/]", highlight=False)
    for title, rows in sections_of(made):
        console.print(f"\n[bold]{title}[/]", highlight=False)
        table = Table(box=None, pad_edge=False, show_header=False)
        table.add_column(min_width=24)
        table.add_column(justify="right", min_width=9)
        table.add_column(style="dim")
        for row in rows:
            bar = "" if row.share is None else f"{'█' * round(_BAR_CHARACTERS * row.share):<{_BAR_CHARACTERS}} "
            table.add_row(row.name, row.value, (bar + row.note).rstrip())
        console.print(table)
    verdict = "[green]fits[/]" if made.fits else "[bold red]does not fit[/]"
    room = (made.worst.usable - made.worst.total) / GIB
    rest = f"{room:,.1f} GiB of room" if made.fits else f"short by {-room:,.1f} GiB"
    console.print(f"\n{verdict}: {rest}. Not in the plan: {'; '.join(NOT_MODELLED)}.", highlight=False)


def _show_layouts(console: Console, layouts: Sequence[Layout], config: RunConfig, cluster: ClusterSpec) -> None:
    if not layouts:
        console.print("\nno layout of these ranks fits")
        return
    fastest = f", the fastest {_SHOWN_LAYOUTS}" if len(layouts) > _SHOWN_LAYOUTS else ""
    console.print(f"\n[bold]{len(layouts)} layouts fit{fastest}[/]", highlight=False)
    table = Table(box=None, pad_edge=False)
    headings = ["tokens/s/GPU", "GiB", "duration", *(["cost"] if cluster.price_per_gpu_hour is not None else [])]
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("changes", overflow="fold")
    for layout in layouts[:_SHOWN_LAYOUTS]:
        run = _run(layout, config, cluster)
        row = [f"{layout.tokens_per_s_gpu:,.0f}", f"{layout.total_bytes / GIB:.1f}", duration(run.wall_s)]
        row += [] if run.cost is None else [cost(run.cost, cluster)]
        table.add_row(*row, layout.overrides or "(as configured)")
    console.print(table)
