"""`cherry cluster ls | up | down | reap | check | render`."""

from __future__ import annotations

import difflib
from pathlib import Path

import click
from click.core import ParameterSource

from base.errors import MissingFileError, OperationalError
from flows.arguments import RUNS_DIRECTORY, WithOverrides, complete_config
from flows.runs.directories import run_directories

_as_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead of tables.")
_file = click.argument("cluster", metavar="FILE")


def _existing(runs_directory: Path) -> Path:
    """The runs directory; one that was given must be there, the default one is made by the first run.

    Raises:
        MissingFileError: it is not.
    """
    source = click.get_current_context().get_parameter_source("runs_directory")
    if source is ParameterSource.DEFAULT or runs_directory.is_dir():
        return runs_directory
    above = runs_directory.absolute().parent
    folders = [one.name for one in above.iterdir() if one.is_dir()] if above.is_dir() else []
    close = difflib.get_close_matches(runs_directory.name, folders, n=3)
    hint = f"Did you mean {' or '.join(str(runs_directory.with_name(one)) for one in close)}?" if close else ""
    raise MissingFileError(f"no directory {runs_directory}, where runs are looked for. {hint or 'Check the path.'}")


def _what_there_is(name: str, names: list[str]) -> str:
    if close := difflib.get_close_matches(name, names, n=3):
        return f"Did you mean {' or '.join(close)}?"
    return f"What holds hosts there: {', '.join(names)}." if names else "Nothing holds hosts there."


@click.group()
def cluster() -> None:
    """Hosts of clusters: what is taken, taking and giving back, and whether they are fit."""


@cluster.command()
@_as_json
@RUNS_DIRECTORY
def ls(*, as_json: bool, runs_directory: Path) -> None:
    """List the hosts that runs and `cherry cluster up` hold, with the state of each.

    `overdue` is held past its maximum lifetime; of `gone` nobody owns it, or its hosts do not answer.
    """
    from rich.console import Console

    from flows.clusters.tables import show_taken
    from tasks.clusters.taken import list_taken

    show_taken(Console(), runs_directory, list_taken(_existing(runs_directory)), as_json=as_json)


@cluster.command()
@_file
@click.option("--name", metavar="NAME", help="What to call it.  [default: the file's name]")
@click.option("--nodes", type=int, metavar="N", help="Hosts to take.  [default: all of the file]")
@RUNS_DIRECTORY
def up(*, cluster: str, name: str | None, nodes: int | None, runs_directory: Path) -> None:
    """Take the hosts of the cluster file FILE, and hold them until `down` or for their maximum lifetime.

    Repeating it takes nothing twice. Runs take their hosts themselves: this is for hosts that are handed out, and are
    to stay between runs.
    """
    from tasks.clusters.keep import take
    from tasks.providers.protocol import CLUSTER_FILE, read_reservation

    directory, hosts, is_new = take(cluster, runs_directory, name=name, nodes=nodes)
    addresses = ", ".join(host.address for host in hosts.hosts)
    click.echo(f"{directory.name}: {'took' if is_new else 'holds'} {addresses}")
    reservation = read_reservation(directory)
    if reservation is not None and reservation.until is not None:
        from flows.clusters.tables import moment

        click.echo(f"  until:  {moment(reservation.until)}, or `cherry cluster down {directory.name}`")
    if (directory / CLUSTER_FILE).exists():
        click.echo(f"  use:    cherry run CONFIG cluster={directory / CLUSTER_FILE}")


@cluster.command()
@click.argument("name", metavar="NAME")
@RUNS_DIRECTORY
def down(*, name: str, runs_directory: Path) -> None:
    """Give back the hosts of NAME: a cluster that is up, or a run that nobody works on any more."""
    from tasks.clusters.give_back import give_back
    from tasks.clusters.taken import list_taken

    everything = list_taken(_existing(runs_directory))
    # A kept cluster comes first; a run of the same name is next.
    taken = next((one for one in everything if one.name == name), None)
    if taken is None:
        names = sorted({one.name for one in everything})
        if name in {run.name for run in run_directories(runs_directory)}:
            click.echo(f"{name} holds no hosts (in {runs_directory}, these do: {', '.join(names) or 'nothing'})")
            return
        raise MissingFileError(f"no cluster and no run {name!r} in {runs_directory}. {_what_there_is(name, names)}")
    give_back(taken)
    click.echo(f"{name}: {', '.join(taken.hosts) or 'what was taken'} given back")


@cluster.command()
@RUNS_DIRECTORY
def reap(*, runs_directory: Path) -> None:
    """Give back hosts that are overdue, or whose run no process works on."""
    from tasks.clusters.give_back import reap as give_back_left

    reaped = give_back_left(_existing(runs_directory))
    for line in reaped.done:
        click.echo(line)
    if not reaped.done and not reaped.failed:
        click.echo("nothing to give back")
    if reaped.failed:
        raise OperationalError("\n".join(reaped.failed))


@cluster.command()
@_file
@_as_json
@RUNS_DIRECTORY
def check(*, cluster: str, as_json: bool, runs_directory: Path) -> None:
    """Check every host that the cluster file FILE names, and measure an all-reduce over them.

    The exit code is 0 only if every host is fit; each that is not is named with what to do. Run it while nothing
    trains there: GPUs in use count as a fault.
    """
    from flows.clusters.check import check_cluster

    check_cluster(cluster, runs_directory, as_json=as_json)


@cluster.command(cls=WithOverrides)
@click.argument("config", metavar="CONFIG", shell_complete=complete_config)
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
def render(*, config: str, overrides: tuple[str, ...]) -> None:
    """Print the job as it is submitted: the sbatch script of `cherry run`, or a task for `sky jobs launch`.

    CONFIG and KEY=VALUE are those of the run, with cluster=FILE among them.
    """
    from base.config import load
    from flows.clusters.render import rendered
    from tasks.run_config import RunConfig

    click.echo(rendered(load(config, RunConfig, overrides)), nl=False)
