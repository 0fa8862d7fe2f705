"""`cherry logs` and `cherry top`: their options. What they do stands in files of their own, which import more."""

from __future__ import annotations

from pathlib import Path

import click

from flows.arguments import RUN_NAME, RUNS_DIRECTORY


@click.command()
@RUN_NAME
@click.option("--step", metavar="STEP", help="Only this step's log, like `train`.")
@click.option("--rank", type=click.IntRange(min=0), metavar="N", help="What rank N of training wrote, on its host.")
@click.option("-f", "--follow", is_flag=True, help="Go on with new lines until nobody works on the run.")
@click.option("--lines", type=click.IntRange(min=0), default=50, show_default=True, metavar="N", help="Lines a step.")
@RUNS_DIRECTORY
def logs(*, name: str, step: str | None, rank: int | None, follow: bool, lines: int, runs_directory: Path) -> None:
    """Print what the steps of a run, their programs and the ranks of training have written."""
    from flows.runs.directories import find_run
    from flows.runs.logs_command import show_logs

    run = find_run(runs_directory, name)
    show_logs(run, step=step, rank=rank, lines=lines, follow=follow, write=click.echo)


@click.command()
@RUN_NAME
@click.option("--once", is_flag=True, help="Print one table and end, as without a terminal.")
@RUNS_DIRECTORY
def top(*, name: str, once: bool, runs_directory: Path) -> None:
    """Watch a run's training: step, loss, each rank's pace, and what each node and GPU uses.

    q or Ctrl-C ends it; the run goes on.
    """
    from rich.console import Console

    from flows.runs.top_command import show_top

    show_top(Console(), runs_directory, name, once=once)
