"""`cherry run`, `cherry deploy` and `cherry demo`: they start flows and print the commands that come next."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from prefect.exceptions import TerminationSignal
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from anything.client import Client
from anything.keys import read_key_file
from base import storage
from base.errors import CherryError, OperationalError
from flows.prefect_server import TemporaryServer
from flows.progress_display import RunProgress
from flows.stop_signals import ending_by_signals
from tasks.lifecycle import judged, summarize
from tasks.overrides import run_directory
from tasks.run_config import RunConfig
from tasks.tracking.connect import connect

DEMO_PROMPT = "def main(argv):\n    "
DEMO_TOKENS = 48


def run(console: Console, server: TemporaryServer, config: RunConfig, arguments: Sequence[str]) -> dict[str, Any]:
    """Run the training flow with its progress in the terminal, and return its summary.

    Args:
        arguments: the config file and the overrides that `config` was resolved from, for the commands that are printed.

    Raises:
        CherryError: the error of the step that failed.
    """
    directory = Path(run_directory(config))
    console.print(f"run [bold]{config.name}[/] in {escape(str(directory))}", highlight=False)

    def flow() -> Any:
        if server.starting:  # MLflow's import and database take seconds too
            connect(config.tracking, config.runs_directory).connect_early()
        from flows.train_flow import train_flow

        with server.answering():
            return train_flow(config, return_state=True)

    with ending_by_signals(), _hinting(console, lambda: _after_failure(directory)), RunProgress(console, directory):
        _result(flow)
    summary = summarize(directory)
    console.print(_table(summary))
    _next(console, config, f"cherry deploy {shlex.join(arguments)}")
    return summary


def deploy(
    console: Console, server: TemporaryServer, config: RunConfig, *, version: int | None = None
) -> dict[str, Any]:
    """Run the deployment flow, and return the release's URL, version and key file.

    Args:
        version: a registered version; `None` is this run's own.

    Raises:
        CherryError: the error of the step that failed.
    """
    logs = f"{Path(config.runs_directory) / 'serving'}/*.log"

    def flow() -> Any:
        from flows.deploy_flow import deploy_flow

        with server.answering():
            return deploy_flow(config, version=version, return_state=True)

    progress = RunProgress(console, Path(run_directory(config)))
    with ending_by_signals(), _hinting(console, lambda: f"  logs:  {logs}"), progress:
        released: dict[str, Any] = _result(flow)
    console.print(f"[bold]{released['version']}[/] answers at {released['url']}", highlight=False)
    body = '{"prompt": "def main(", "max_tokens": 32}'
    console.print(
        f'  ask:   curl {released["url"]}/v1/anything/infer -H "Authorization: Bearer $(cat {released["key_file"]})" '
        f"-H 'Content-Type: application/json' -d '{body}'\n"
        f"  logs:  {logs}\n"
        f"  stop:  cherry stop --runs-directory {config.runs_directory}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
    return released


def demo(console: Console, server: TemporaryServer, config: RunConfig, arguments: Sequence[str]) -> None:
    """Train, release, and send the release one request; writes summary.json.

    Args:
        arguments: see `run`.
    """
    run(console, server, config, arguments)
    released = deploy(console, server, config)
    with Client(released["url"], read_key_file(released["key_file"])) as client:
        output = client.infer(DEMO_PROMPT, max_tokens=DEMO_TOKENS)
    directory = Path(run_directory(config))
    summary = {**summarize(directory), "infer_prompt": DEMO_PROMPT, "infer_output": output, "url": released["url"]}
    storage.write_json(str(directory / "summary.json"), summary)
    console.print("\n[bold]asked[/]")
    console.print(DEMO_PROMPT + output, highlight=False, markup=False)
    console.print(f"\nsummary: {directory / 'summary.json'}", highlight=False, markup=False)


@contextmanager
def _hinting(console: Console, hints: Callable[[], str]) -> Iterator[None]:
    """After a failure, Ctrl-C or another signal, print where to look and how to resume; the error is printed last."""
    try:
        yield
    except (CherryError, KeyboardInterrupt, TerminationSignal):
        console.print(hints(), highlight=False, markup=False, soft_wrap=True)
        raise


def _after_failure(directory: Path) -> str:
    """Lines that name the logs, if there are any, and the way to resume."""
    logs = [str(path) for path in (directory / "events.jsonl", directory / "train") if path.exists()]
    lines = [f"  logs:     {', '.join(logs)}"] if logs else []
    return "\n".join([*lines, "  resume:   the same command; finished steps are found"])


def _result(flow: Callable[[], Any]) -> Any:
    """The flow's result.

    Raises:
        CherryError: the error of the step that failed.
        OperationalError: Prefect's server could not be reached, or the flow was cancelled or crashed.
    """
    try:
        state = flow()
    except CherryError:
        raise
    except (RuntimeError, httpx.HTTPError) as error:  # errors of the flow itself are in its state
        raise OperationalError(_no_server(error)) from error
    if state.is_completed():
        return state.result()
    try:
        state.result()
    except CherryError:
        raise
    except Exception as error:
        raise OperationalError(f"the flow ended as {state.name}: {error}") from error
    raise OperationalError(f"the flow ended as {state.name}")


def _no_server(error: Exception) -> str:
    from prefect.settings import PREFECT_API_URL

    url = PREFECT_API_URL.value()
    if url:
        address = httpx.URL(url).copy_with(userinfo=b"")
        return f"Prefect's server at {address} does not answer ({error}). Start it, or unset PREFECT_API_URL."
    return (
        f"Prefect's temporary server no longer answers ({error}). Start the same command again, or start a server "
        "(prefect --no-prompt server start) and set PREFECT_API_URL."
    )


def _table(summary: dict[str, Any]) -> Table:
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="bold")
    table.add_column()
    rows = {
        "loss": f"{summary['loss_first']:.3f} -> {summary['loss_last']:.3f}",
        "held-out": f"{summary['heldout_bits_per_byte']:.3f} bits per byte (zlib: {summary['zlib_bits_per_byte']:.3f})",
        "quantized": _quantized(summary),
        "verdict": f"{summary['verdict']} (compared with {summary['compared_with']}): {judged(summary)}",
        "data": f"{summary['documents']:,} documents, {summary['data_bytes'] / 1e6:.1f} MB",
        "seconds": ", ".join(f"{step} {seconds:.1f}" for step, seconds in summary["seconds"].items()),
    }
    for name, value in rows.items():
        table.add_row(name, escape(value))
    return table


def _quantized(summary: dict[str, Any]) -> str:
    """A line for each format that was quantized in; the run's own, which is the first, is served."""
    if not summary["formats"]:  # evaluated by an earlier version
        return f"{summary['quantized_bytes_ratio']:.2f} of the bytes, {summary['quantized_dnll']:+.4f} nats per token"
    return "\n".join(
        f"{row['format']}: {row['bytes_ratio']:.2f} of the bytes, {row['dnll']:+.4f} nats per token, likeliest token "
        f"the same for {row['top1']:.1%}: {'passed' if row['passed'] else 'not to be served'}"
        for row in summary["formats"]
    )


def _next(console: Console, config: RunConfig, deploy_command: str) -> None:
    # The address behind the command on a line of its own: the two together are longer than most terminals are wide.
    page = connect(config.tracking, config.runs_directory).page().replace("  # ", f"\n{12 * ' '}", 1)
    prefect = os.environ.get("PREFECT_API_URL", "prefect --no-prompt server start").removesuffix("/api")
    console.print(
        f"\n  figures:  {page}\n  flow:     {prefect}\n  logs:     {run_directory(config)}/train/\n"
        f"  resume:   the same command; finished steps are found\n  serve:    {deploy_command}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
