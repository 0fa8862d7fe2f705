"""Owns the `cherry` command: its arguments, and what a person reads at the end of each of its subcommands.

It knows the flows and the run directory; what the steps do is theirs.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from base.config import load, packaged_config
from base.errors import CherryError, run_program
from cherry import __version__
from cherry.cluster import LOCAL
from flows.offline import set_offline_defaults
from flows.prefect_server import TemporaryServer
from tasks.run_config import RunConfig

_STATE_STYLE = {"ok": "green", "note": "yellow", "fail": "bold red"}
# Where the pages and the gateway listen unless a person says otherwise: each tool's own default port.
PORTS = (("the Anything gateway", 8080), ("the Prefect page", 4200), ("the MLflow page", 5000))


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = argparse.ArgumentParser(
        prog="cherry", description="From data to a served, A/B-tested release of a DeepSeek-V3-class model."
    )
    parser.add_argument("--version", action="version", version=f"cherry {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    run = commands.add_parser("run", help="data, training, quantization, evaluation and registration")
    deploy = commands.add_parser("deploy", help="serve a registered version and shift traffic to it")
    for command in (run, deploy):
        command.add_argument("config", metavar="CONFIG", help="a YAML file, like configs/tiny.yaml")
        # A default keeps argparse from calling them required.
        command.add_argument(
            "overrides", nargs="*", default=[], metavar="key=value", help="like train.learning_rate=2e-6"
        )
        command.add_argument("--verbose", action="store_true", help="print every log line of the flow")
    deploy.add_argument("--model-version", type=int, metavar="N", help="a registered version; default: this run's own")

    plan = commands.add_parser("plan", help="memory, speed, duration and cost of a run, before it takes a GPU")
    plan.add_argument("config", metavar="CONFIG", help="a YAML file, like configs/671b.yaml")
    plan.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="like parallel.expert=32")
    plan.add_argument("--cluster", metavar="CLUSTER", help="a spec of configs/clusters/; default: the config's own")
    plan.add_argument("--json", action="store_true", help="print one JSON document instead of tables")
    plan.add_argument(
        "--plot", type=Path, metavar="FILE", help="draw the memory by stage and component: .png, .svg or .pdf"
    )
    plan.add_argument("--search", action="store_true", help="rank the layouts that fit by predicted speed")

    status = commands.add_parser("status", help="every run: finished steps, loss, checkpoint, processes")
    stop = commands.add_parser("stop", help="stop what `cherry deploy` started")
    doctor = commands.add_parser("doctor", help="whether this machine can run the pipeline")
    for command in (status, stop, doctor):
        command.add_argument(
            "--runs-directory", type=Path, default=Path("runs"), metavar="DIR", help="where runs lie; default: runs"
        )
    commands.add_parser("demo", help="text to a served release with configs/tiny.yaml")
    return parser


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line's values; flags may stand before, between and behind the overrides."""
    parser = build_parser()
    options, rest = parser.parse_known_args(arguments)
    if rest:
        # argparse takes what stands behind a flag for unknown: inside a subcommand it cannot intermix them.
        if not hasattr(options, "overrides") or any(word.startswith("-") for word in rest):
            parser.error(f"unrecognized arguments: {' '.join(rest)}{_without_dashes(options, rest)}")
        options.overrides = [*options.overrides, *rest]
    return options


def _without_dashes(options: argparse.Namespace, rest: Sequence[str]) -> str:
    """A hint for overrides that were written like flags."""
    dashed = [word.lstrip("-") for word in rest if word.startswith("--") and "=" in word]
    if not dashed or not hasattr(options, "overrides"):
        return ""
    return f". Keys of the config have no dashes: {' '.join(dashed)}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the console script; ends the process with the error's exit code."""
    options = parse(arguments)
    raise SystemExit(run_program(lambda: _dispatch(options)))


def _dispatch(options: argparse.Namespace) -> None:
    console = Console()
    for named in (getattr(options, "config", None), getattr(options, "cluster", None)):
        _say_packaged(named)
    set_offline_defaults(verbose=getattr(options, "verbose", False))  # before what imports prefect
    if options.command == "plan":
        from flows.plan_command import plan

        plan(
            console,
            options.config,
            options.cluster,
            options.overrides,
            as_json=options.json,
            with_search=options.search,
            plot=options.plot,
        )
    elif options.command == "doctor":
        _doctor(console, options.runs_directory)
    elif options.command == "status":
        _status(console, options.runs_directory)
    elif options.command == "stop":
        from tasks.replicas import stop_serving

        stopped = stop_serving(str(options.runs_directory))
        console.print(f"stopped {', '.join(stopped)}" if stopped else "nothing was being served")
    else:
        if options.command != "demo":
            load(options.config, RunConfig, options.overrides)  # a mistake in it is told before anything starts
        server = TemporaryServer()
        server.start()
        from flows.commands import demo, deploy, run  # which imports Prefect for a second, as the server does

        if options.command == "run":
            run(console, server, options.config, options.overrides)
        elif options.command == "deploy":
            deploy(console, server, options.config, options.overrides, version=options.model_version)
        else:
            demo(console, server)


def _say_packaged(named: str | None) -> None:
    """Tell which packaged file a name or a path that is not in the working directory stands for."""
    if named is not None and named != LOCAL and (file := packaged_config(named)) is not None:
        console = Console(stderr=True, soft_wrap=True)
        console.print(f"{named}: taken from the package, {file}", highlight=False, markup=False)


def _doctor(console: Console, runs_directory: Path) -> None:
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


def _status(console: Console, runs_directory: Path) -> None:
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
    _status_of_serving(console, runs_directory)


def _status_of_serving(console: Console, runs_directory: Path) -> None:
    from tasks.replicas import ServingDirectory

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
