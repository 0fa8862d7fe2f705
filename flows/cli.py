"""The `cherry` command: its subcommands and their options, and the tables of `status` and `doctor`.

Imports that take long stand in the subcommands that need them, so that `cherry --help` is fast.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from base.errors import CherryError, run_program
from cherry import __version__
from flows.offline import keep_terminal_free, set_offline_defaults

if TYPE_CHECKING:
    from rich.console import Console

    from flows.prefect_server import TemporaryServer
    from tasks.run_config import RunConfig

_STATE_STYLE = {"ok": "green", "note": "yellow", "fail": "bold red"}
# Default port of the gateway, the Prefect page and the MLflow page: each program's own.
PORTS = (("the Anything gateway", 8080), ("the Prefect page", 4200), ("the MLflow page", 5000))
DEMO_CONFIG = "configs/tiny.yaml"
DEMO_OVERRIDES = ("name=demo", "register_model.model_name=cherry-demo")


class _WithOverrides(click.Command):
    """A subcommand with key=value arguments; its error explains how to write keys that were given as options."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Remaining arguments, as click parses them; an unknown option's error explains KEY=VALUE."""
        written = {word.split("=")[0]: word.lstrip("-") for word in args if word.startswith("--") and "=" in word}
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            if error.option_name not in written:
                raise
            hint = f"Keys of the config have no dashes: {written[error.option_name]}"
            raise click.UsageError(f"{error.format_message()} {hint}", ctx) from error


def _underscores_to_dashes(token: str) -> str:
    return token.replace("_", "-")


@click.group(
    context_settings={
        "help_option_names": ["-h", "--help"],
        "token_normalize_func": _underscores_to_dashes,
        "max_content_width": 120,
    }
)
@click.version_option(__version__, message="cherry %(version)s")
def cli() -> None:
    """Take a DeepSeek-V3-class model from data to a served, A/B-tested release."""


_config = click.argument("config", metavar="CONFIG")
_overrides = click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
_verbose = click.option("--verbose", is_flag=True, help="Print every log line of the flow.")
_runs_directory = click.option(
    "--runs-directory",
    type=click.Path(path_type=Path),
    default=Path("runs"),
    show_default=True,
    metavar="DIR",
    help="Directory of the runs.",
)


@cli.command(cls=_WithOverrides)
@_config
@_overrides
@_verbose
def run(*, config: str, overrides: tuple[str, ...], verbose: bool) -> None:
    """Prepare data, train, export, quantize, evaluate and register.

    CONFIG is a YAML file, like configs/tiny.yaml. KEY=VALUE sets one of its keys, like train.learning_rate=2e-6. The
    same command resumes a run that was interrupted.
    """
    console, server, resolved = _start(config, overrides, verbose=verbose)
    from flows import commands  # after the server's start: both import Prefect, which takes a second

    commands.run(console, server, resolved, [config, *overrides])


@cli.command(cls=_WithOverrides)
@_config
@_overrides
@click.option("--model-version", type=int, metavar="N", help="A registered version.  [default: this run's own]")
@_verbose
def deploy(*, config: str, overrides: tuple[str, ...], model_version: int | None, verbose: bool) -> None:
    """Serve a registered version and shift traffic to it.

    CONFIG and KEY=VALUE are those that the run was made with.
    """
    console, server, resolved = _start(config, overrides, verbose=verbose)
    from flows import commands

    commands.deploy(console, server, resolved, version=model_version)


@cli.command()
@_verbose
def demo(*, verbose: bool) -> None:
    """Train and release the tiny model of configs/tiny.yaml, and send it a prompt."""
    console, server, resolved = _start(DEMO_CONFIG, DEMO_OVERRIDES, verbose=verbose)
    from flows import commands

    commands.demo(console, server, resolved, [DEMO_CONFIG, *DEMO_OVERRIDES])


@cli.command(cls=_WithOverrides)
@_config
@_overrides
@click.option("--cluster", metavar="CLUSTER", help="A cluster file, or `local`.  [default: the config's own]")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead of tables.")
@click.option("--plot", type=click.Path(path_type=Path), metavar="FILE", help="Draw the memory: .png, .svg or .pdf.")
@click.option("--search", is_flag=True, help="Rank the parallel layouts that fit by predicted speed.")
def plan(
    *, config: str, overrides: tuple[str, ...], cluster: str | None, as_json: bool, plot: Path | None, search: bool
) -> None:
    """Predict memory, speed, duration and cost of a run.

    CONFIG is a YAML file, like configs/671b.yaml. KEY=VALUE sets one of its keys, like parallel.expert=32.
    """
    from rich.console import Console

    from flows import plan_command

    resolved = _resolve(config, overrides)
    if cluster is not None:
        _print_packaged(cluster)
    plan_command.plan(Console(), resolved, cluster, as_json=as_json, with_search=search, plot=plot)


@cli.command()
@_runs_directory
def status(*, runs_directory: Path) -> None:
    """Show every run: finished steps, loss, checkpoint, processes."""
    from rich.console import Console

    _show_status(Console(), runs_directory)


@cli.command()
@_runs_directory
def stop(*, runs_directory: Path) -> None:
    """Stop the gateway and the replicas that `cherry deploy` started."""
    from tasks.processes.replicas import stop_serving

    stopped = stop_serving(str(runs_directory))
    click.echo(f"stopped {', '.join(stopped)}" if stopped else "nothing was being served")


@cli.command()
@_runs_directory
def doctor(*, runs_directory: Path) -> None:
    """Check whether this machine can run the pipeline."""
    from rich.console import Console

    _show_checks(Console(), runs_directory)


@cli.command()
@click.argument("directory", type=click.Path(path_type=Path), default=Path(), metavar="[DIR]")
def init(*, directory: Path) -> None:
    """Write a commented config and cluster file to start from.

    They go to DIR, by default the working directory. No file is overwritten.
    """
    from flows import init_command

    written = init_command.init(directory)
    click.echo(f"wrote {', '.join(map(str, written))}. Next: cherry plan {written[0]}")


@cli.command()
@click.option("--write", type=click.Path(path_type=Path), metavar="DIR", help="Write it to schema.json in DIR instead.")
def schema(*, write: Path | None) -> None:
    """Print the JSON schema of a config: every key with its type, default and description."""
    from flows import schema_command

    if write is None:
        click.echo(schema_command.schema_text(), nl=False)
    else:
        click.echo(f"wrote {schema_command.write_schema(write)}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the console script; ends the process with the error's exit code."""
    raise SystemExit(run_program(lambda: _call(arguments)))


def _call(arguments: Sequence[str] | None) -> None:
    set_offline_defaults()  # before anything imports Prefect or MLflow
    try:
        cli.main(None if arguments is None else list(arguments), prog_name="cherry", standalone_mode=False)
    except click.UsageError as error:
        error.show()
        raise SystemExit(error.exit_code) from error
    except click.Abort as error:  # how click passes Ctrl-C on
        raise KeyboardInterrupt from error


def _resolve(config: str, overrides: Sequence[str]) -> RunConfig:
    """The validated config of a run.

    Raises:
        MissingFileError, ConfigError: the file is missing, or it or an override breaks rules.
    """
    from base.config import load
    from tasks.run_config import RunConfig

    _print_packaged(config)
    return load(config, RunConfig, overrides)


def _print_packaged(name: str) -> None:
    """Print which packaged file a name, or a path that is not in the working directory, refers to."""
    from base.config import packaged_config
    from cherry.cluster import LOCAL

    if name != LOCAL and (file := packaged_config(name)) is not None:
        click.echo(f"{name}: taken from the package, {file}", err=True)


def _start(config: str, overrides: Sequence[str], *, verbose: bool) -> tuple[Console, TemporaryServer, RunConfig]:
    """Console, starting Prefect server and resolved config of a command that starts a flow."""
    from rich.console import Console

    from flows.prefect_server import TemporaryServer
    from tasks.overrides import run_directory

    if not verbose:
        keep_terminal_free()
    resolved = _resolve(config, overrides)
    run_directory(resolved)  # a mistake in the config ends the command before anything starts
    server = TemporaryServer()
    server.start()
    return Console(), server, resolved


def _show_checks(console: Console, runs_directory: Path) -> None:
    from rich.table import Table

    from flows.doctor import examine

    table = Table(box=None, pad_edge=False)
    for heading in ("", "check", "found", "what to do"):
        table.add_column(heading, overflow="fold")
    checks = examine(runs_directory, PORTS)
    for check in checks:
        style = _STATE_STYLE[check.state]
        table.add_row(f"[{style}]{check.state}[/]", check.name, check.found, check.advice)
    console.print(table)
    failed = [check.name for check in checks if check.state == "fail"]
    if failed:
        raise CherryError(f"{len(failed)} of {len(checks)} checks failed: {', '.join(failed)}")
    console.print("\nReady. Next: cherry run configs/tiny.yaml")


def _show_status(console: Console, runs_directory: Path) -> None:
    from rich.table import Table

    from flows.status import read_runs
    from tasks.lifecycle import STEPS

    runs = read_runs(runs_directory, list(STEPS))
    if not runs:
        console.print(f"no runs in {runs_directory}. Next: cherry run configs/tiny.yaml")
        return
    table = Table(box=None, pad_edge=False)
    for heading in ("run", "finished", "training", "loss", "checkpoint", "processes"):
        table.add_column(heading)
    for run in runs:
        training = "-" if run.step is None else f"{run.step}/{run.steps_total or '?'}"
        loss = "-" if run.loss is None else f"{run.loss:.3f}"
        finished = f"{len(run.finished)}: {list(run.finished)[-1]}" if run.finished else "-"
        table.add_row(run.name, finished, training, loss, run.checkpoint or "-", str(run.processes))
    console.print(table)
    _show_serving(console, runs_directory)


def _show_serving(console: Console, runs_directory: Path) -> None:
    from rich.table import Table

    from tasks.processes.replicas import ServingDirectory

    serving = ServingDirectory(str(runs_directory))
    weights, servers = serving.weights(), serving.servers()
    if not servers:
        return
    table = Table(box=None, pad_edge=False)
    for heading in ("\nserving", "\nurl", "\ntraffic", "\nstate"):
        table.add_column(heading)
    for server in servers:
        traffic = f"{weights[server.name]:g} %" if server.name in weights else "-"
        table.add_row(server.name, server.url or "-", traffic, "up" if server.alive else "[red]gone[/]")
    console.print(table)


if __name__ == "__main__":
    main()
