"""`cherry services up | status | down`."""

from __future__ import annotations

from pathlib import Path

import click

DEFAULT_DIRECTORY = Path("services")
_directory = click.option(
    "--directory",
    type=click.Path(path_type=Path),
    default=DEFAULT_DIRECTORY,
    show_default=True,
    metavar="DIR",
    help="Their data, logs and passwords.",
)


@click.group()
def services() -> None:
    """Prefect and MLflow on PostgreSQL and an S3 store, with passwords, on this machine."""


@services.command()
@_directory
@click.option("--prefect-port", type=click.IntRange(1, 65535), metavar="PORT", help="Prefect's port.  [default: 4200]")
@click.option("--mlflow-port", type=click.IntRange(1, 65535), metavar="PORT", help="MLflow's port.  [default: 5000]")
def up(*, directory: Path, prefect_port: int | None, mlflow_port: int | None) -> None:
    """Start what does not run yet, wait until it answers, and write the clients' variables.

    A program that ends is started again. The ports are those of the first start.
    """
    from flows.services.layout import Ports, open_services
    from flows.services.start import up as start

    given = {"prefect": prefect_port, "mlflow": mlflow_port}
    chosen = {name: port for name, port in given.items() if port is not None}
    found = open_services(directory, Ports(**chosen) if chosen else None)
    environment = start(found, click.echo)
    click.echo(f"Prefect {found.prefect_url.removesuffix('/api')}, MLflow {found.mlflow_url}; user admin, passwords in")
    click.echo(f"{environment}. Next:\n  . {environment}\n  cherry setup\n  prefect worker start --pool cherry")


@services.command()
@_directory
def status(*, directory: Path) -> None:
    """Show the state of each program."""
    from flows.services.layout import open_existing
    from flows.services.start import states

    found = states(open_existing(directory))
    for one in found:
        click.echo(f"{one.name:9} {one.state:9} {one.description}")
    if not found:
        click.echo("nothing runs. Start it: cherry services up")


@services.command()
@_directory
def down(*, directory: Path) -> None:
    """Stop all of them. Data and passwords stay."""
    from flows.services.layout import open_existing
    from flows.services.start import down as stop

    click.echo("stopped" if stop(open_existing(directory)) else "nothing ran")
