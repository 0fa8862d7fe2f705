"""The `cherry` command: its subcommands and their options, and the table of `doctor`.

Imports that take long stand in the subcommands that need them, so that `cherry --help` is fast.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if __name__ == "__main__":  # a file that is run by its path finds only its neighbours
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from cherry_main import explain_missing

    sys.excepthook = explain_missing

import click

from base.errors import CherryError, ConfigError, run_program
from cherry import __version__
from cherry.launcher import die_with_parent
from flows.arguments import RUN_NAME, RUNS_DIRECTORY, Directory, WithOverrides, complete_config, complete_run
from flows.clusters.command import cluster
from flows.offline import keep_terminal_free, set_offline_defaults
from flows.services.services_command import services
from flows.terminal import noting_interrupts
from flows.watch_commands import logs, top
from model.calibration.names import METHODS, NEAREST
from model.numerics.formats import DEFAULT_FORMAT, FORMATS

if TYPE_CHECKING:
    from rich.console import Console

    from flows.prefect_server import TemporaryServer
    from tasks.run_config import RunConfig

_STATE_STYLE = {"ok": "green", "note": "yellow", "fail": "bold red"}
# Default port of the gateway, the Prefect page and the MLflow page: each program's own.
PORTS = (("the Anything gateway", 8080), ("the Prefect page", 4200), ("the MLflow page", 5000))
DEMO_CONFIG = "configs/tiny.yaml"
DEMO_OVERRIDES = ("name=demo", "register_model.model_name=cherry-demo")


def _underscores_to_dashes(token: str) -> str:
    return token.replace("_", "-")


@click.group(
    commands=[cluster, services, logs, top],
    context_settings={
        "help_option_names": ["-h", "--help"],
        "token_normalize_func": _underscores_to_dashes,
        "max_content_width": 120,
    },
)
@click.version_option(__version__, message="cherry %(version)s")
def cli() -> None:
    """Take a DeepSeek-V3-class model from data to a served, A/B-tested release."""


_config = click.argument("config", metavar="CONFIG", shell_complete=complete_config)
_overrides = click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
_verbose = click.option("--verbose", is_flag=True, help="Print every log line of the flow.")
_as_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead of tables.")


@cli.command(cls=WithOverrides)
@_config
@_overrides
@click.option("--dry-run", is_flag=True, help="Only show which steps would be found finished, and which would run.")
@_verbose
def run(*, config: str, overrides: tuple[str, ...], dry_run: bool, verbose: bool) -> None:
    """Prepare data, train, export, quantize, evaluate and register.

    CONFIG is a YAML file, like configs/tiny.yaml. KEY=VALUE sets one of its keys, like train.learning_rate=2e-6. The
    same command resumes a run that was interrupted.
    """
    if dry_run:
        _dry_run(config, overrides)
        return
    console, server, resolved = _start(config, overrides, verbose=verbose, reads_data=True)
    from flows import commands  # after the server's start: both import Prefect, which takes a second

    commands.run(console, server, resolved, [config, *overrides])


@cli.command(cls=WithOverrides)
@_config
@_overrides
@click.option("--model-version", type=int, metavar="N", help="A registered version.  [default: this run's own]")
@_verbose
def deploy(*, config: str, overrides: tuple[str, ...], model_version: int | None, verbose: bool) -> None:
    """Serve a registered version and shift traffic to it.

    CONFIG and KEY=VALUE are those that the run was made with.
    """
    console, server, resolved = _start(config, overrides, verbose=verbose, serves=True)
    from flows import commands

    commands.deploy(console, server, resolved, version=model_version)


@cli.command()
@_verbose
def demo(*, verbose: bool) -> None:
    """Train and release the tiny model of configs/tiny.yaml, and send it a prompt."""
    console, server, resolved = _start(DEMO_CONFIG, DEMO_OVERRIDES, verbose=verbose, reads_data=True, serves=True)
    from flows import commands

    commands.demo(console, server, resolved, [DEMO_CONFIG, *DEMO_OVERRIDES])


@cli.command(cls=WithOverrides)
@_config
@_overrides
@click.option("--cluster", metavar="CLUSTER", help="A cluster file, or `local`.  [default: the config's own]")
@_as_json
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
@click.argument("name", metavar="[NAME]", required=False, shell_complete=complete_run)
@_as_json
@RUNS_DIRECTORY
def status(*, name: str | None, as_json: bool, runs_directory: Path) -> None:
    """Show every run, or the run NAME in detail: state, steps, verdict, age, traffic."""
    from rich.console import Console

    from flows.runs import status_command

    if name is None:
        status_command.show_all(Console(), runs_directory, as_json=as_json)
    else:
        status_command.show_one(Console(), runs_directory, name, as_json=as_json)


@cli.command()
@click.argument("first", metavar="A", shell_complete=complete_run)
@click.argument("second", metavar="B", shell_complete=complete_run)
@_as_json
@RUNS_DIRECTORY
def compare(*, first: str, second: str, as_json: bool, runs_directory: Path) -> None:
    """Show two runs side by side: their configs' differences, figures, and the difference in held-out loss."""
    from rich.console import Console

    from flows.runs.compare_command import show_comparison

    show_comparison(Console(), runs_directory, first, second, as_json=as_json)


@cli.command()
@RUN_NAME
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.option("--force", is_flag=True, help="Remove it even if its version is champion or served.")
@RUNS_DIRECTORY
def rm(*, name: str, yes: bool, force: bool, runs_directory: Path) -> None:
    """Remove a run's directory, after a list of what goes. Its figures stay in the tracker."""
    from flows.runs.rm_command import remove

    def confirm(lines: list[str]) -> bool:
        click.echo("\n".join(lines))
        if not yes and not sys.stdin.isatty():
            raise ConfigError("nothing was removed: there is no terminal to ask on. Give --yes.")
        return yes or click.confirm("Remove it?", default=False)

    removed = remove(runs_directory, name, force=force, confirm=confirm)
    click.echo("nothing was removed" if removed is None else f"removed {removed[0]}")


@cli.command()
@RUNS_DIRECTORY
def stop(*, runs_directory: Path) -> None:
    """Stop the gateway and the replicas that `cherry deploy` started."""
    from tasks.processes.replicas import stop_serving

    stopped = stop_serving(str(runs_directory))
    click.echo(f"stopped {', '.join(stopped)}" if stopped else "nothing was being served")


@cli.command()
@click.argument("source")
@click.argument("target")
@click.option("--format", "scheme", type=click.Choice(list(FORMATS)), default=DEFAULT_FORMAT, show_default=True)
@click.option("--workers", type=click.IntRange(1), metavar="N", help="Processes.  [default: a core each]")
@click.option("--method", type=click.Choice(METHODS), default=NEAREST, show_default=True, help="Of int4 weights.")
@click.option("--calibration", metavar="DATA", help="For other methods: a run's data directory, or text files.")
@click.option("--calibration-tokens", type=click.IntRange(1), metavar="N", help="Of it.  [default: 128 sequences]")
def quantize(*, source: str, target: str, scheme: str, **given: str | int | None) -> None:
    """Quantize the weights of SOURCE into TARGET, folders or URIs, without a run.

    The same command goes on after it was interrupted.
    """
    from tasks.processes.programs import module_command, module_environment

    flags = ["--source", source, "--target", target, "--format", scheme]
    for name, value in given.items():
        flags += [] if value is None else [f"--{name.replace('_', '-')}", str(value)]
    command = module_command("cherry.calibration.quantize", flags)
    sys.stdout.flush()
    os.execve(command[0], command, module_environment())  # signals, output and exit code are the program's  # noqa: S606


@cli.command()
@RUNS_DIRECTORY
@click.option("--yes", is_flag=True, help="Remove them without asking.")
def gc(*, runs_directory: Path, yes: bool) -> None:
    """List prepared data and outputs that nothing refers to, and remove them."""
    from rich.console import Console

    from flows import gc_command

    gc_command.collect(Console(), runs_directory, yes=yes)


@cli.command()
@RUNS_DIRECTORY
def doctor(*, runs_directory: Path) -> None:
    """Check whether this machine can run the pipeline."""
    from rich.console import Console

    _show_checks(Console(), runs_directory)


@cli.command()
@click.option("--notify-file", type=click.Path(path_type=Path), metavar="FILE", help="Where to tell of failures.")
def setup(*, notify_file: Path | None) -> None:
    """Make the work pool, the deployments and the automations on the Prefect server of PREFECT_API_URL.

    Run it in a checkout. Repeating it brings them up to date. FILE has an address a line: a webhook, or another that
    Apprise knows, like mailtos://...; an empty one ends notifications.
    """
    from flows import setup_command

    for line in setup_command.set_up(Path(), notify_file):
        click.echo(line)
    click.echo("Next: prefect worker start --pool cherry")


@cli.command()
@click.argument("directory", type=Directory(), default=Path(), metavar="[DIR]")
def init(*, directory: Path) -> None:
    """Write a commented config and cluster file to start from.

    They go to DIR, by default the working directory. No file is overwritten.
    """
    from flows import init_command

    written = init_command.init(directory)
    click.echo(f"wrote {', '.join(map(str, written))}. Next: cherry plan {written[0]}")


@cli.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(*, shell: str) -> None:
    """Print what makes SHELL complete commands, options, configs and runs: eval "$(cherry completion bash)"."""
    from click.shell_completion import get_completion_class

    found = get_completion_class(shell)
    assert found is not None
    click.echo(found(cli, {}, "cherry", "_CHERRY_COMPLETE").source())


@cli.command()
@click.option("--write", type=Directory(), metavar="DIR", help="Write it to schema.json in DIR instead.")
def schema(*, write: Path | None) -> None:
    """Print the JSON schema of a config: every key with its type, default and description."""
    from flows import schema_command

    if write is None:
        click.echo(schema_command.schema_text(), nl=False)
    else:
        click.echo(f"wrote {schema_command.write_schema(write)}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the console script; ends the process with the error's exit code."""
    with noting_interrupts() as interrupted:
        code = run_program(lambda: _call(arguments), interrupted=interrupted)
    raise SystemExit(code)


def _call(arguments: Sequence[str] | None) -> None:
    if "MAKELEVEL" in os.environ:
        die_with_parent(signal.SIGTERM, os.getppid())  # a killed `make demo` ends its demo
    set_offline_defaults()  # before anything imports Prefect or MLflow
    try:
        cli.main(None if arguments is None else list(arguments), prog_name="cherry", standalone_mode=False)
    except click.UsageError as error:
        error.show()
        raise SystemExit(ConfigError.exit_code) from error
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
    from base.yaml_config import packaged_config
    from cherry.cluster import LOCAL

    if name != LOCAL and (file := packaged_config(name)) is not None:
        click.echo(f"{name}: taken from the package, {file}", err=True)


def _start(
    config: str, overrides: Sequence[str], *, verbose: bool, reads_data: bool = False, serves: bool = False
) -> tuple[Console, TemporaryServer, RunConfig]:
    """Console, starting Prefect server and resolved config of a command that starts a flow.

    Args:
        reads_data: the flow reads what the config points at, so it must be there.
        serves: the flow starts servers, so what they need must be there, like a port.
    """
    from rich.console import Console

    from base.lost_output import outlive_output
    from flows.prefect_server import TemporaryServer
    from tasks.inputs import check_inputs, check_serving
    from tasks.overrides import run_directory
    from tasks.tracking.connect import check_tracking_servers

    outlive_output()  # before rich takes the streams: a closed terminal must not stop the clean-up
    if not verbose:
        keep_terminal_free()
    resolved = _resolve(config, overrides)
    run_directory(resolved)  # a mistake in the config ends the command before anything starts
    if reads_data:
        check_inputs(resolved)
    if serves:
        check_serving(resolved)
    check_tracking_servers(resolved.tracking, resolved.runs_directory)
    server = TemporaryServer()
    server.start()
    return Console(), server, resolved


def _dry_run(config: str, overrides: Sequence[str]) -> None:
    from rich.console import Console

    from flows.dry_run import show_steps

    keep_terminal_free()
    show_steps(Console(), _resolve(config, overrides))


def _show_checks(console: Console, runs_directory: Path) -> None:
    from rich.markup import escape
    from rich.table import Table

    from flows.doctor import examine

    table = Table(box=None, pad_edge=False)
    for heading in ("", "check", "found", "what to do"):
        table.add_column(heading, overflow="fold")
    checks = examine(runs_directory, PORTS)
    for check in checks:
        style = _STATE_STYLE[check.state]
        table.add_row(f"[{style}]{check.state}[/]", check.name, escape(check.found), escape(check.advice))
    console.print(table)
    failed = [check.name for check in checks if check.state == "fail"]
    if failed:
        raise CherryError(f"{len(failed)} of {len(checks)} checks failed: {', '.join(failed)}")
    console.print("\nReady. Next: cherry run configs/tiny.yaml")


if __name__ == "__main__":
    main()
