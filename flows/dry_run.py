"""`cherry run --dry-run`: which steps would be found finished and which would run, and why. Nothing is written."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cherry.cluster import read_cluster
from cherry.planner.report import summary_line
from flows.runs.status import is_held
from tasks.data import prepare_data
from tasks.evaluate import evaluate
from tasks.export import export
from tasks.inputs import check_inputs
from tasks.overrides import run_directory
from tasks.plan_record import predict, refuse
from tasks.provision import provision
from tasks.quantize import quantize
from tasks.register import register
from tasks.run_config import RunConfig
from tasks.steps import NotFinishedError, RunContext, StepRecord, flatten, read_record, step_file
from tasks.tracking.connect import connect
from tasks.train import train

_SHOWN_CHANGES = 3
# By step: the task, and the steps whose records it takes.
_STEPS: dict[str, tuple[Callable[..., StepRecord], tuple[str, ...]]] = {
    "provision": (provision.fn, ()),
    "data": (prepare_data.fn, ()),
    "train": (train.fn, ("data",)),
    "export": (export.fn, ("train",)),
    "quantize": (quantize.fn, ("data", "export")),
    "evaluate": (evaluate.fn, ("data", "export", "quantize")),
    "register": (register.fn, ("export", "quantize", "evaluate")),
}


@dataclass(frozen=True)
class Forecast:
    """What a run would do with one step."""

    step: str
    is_found: bool
    why: str


def show_steps(console: Console, config: RunConfig) -> None:
    """Print the forecast of a run, and its plan in a line.

    Raises:
        MissingFileError, ConfigError: what the config points at is not there, or breaks a rule.
        DoesNotFitError: by the plan, memory is short; the forecast has been printed.
    """
    directory = Path(run_directory(config))
    check_inputs(config)
    console.print(
        f"run [bold]{config.name}[/] in {escape(str(directory))}: a dry run, nothing is started", highlight=False
    )
    if is_held(directory):
        console.print("[yellow]a live process works on it now: the run would be refused[/]")
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for step in forecast(config):
        table.add_row(step.step, "[green]found[/]" if step.is_found else "[cyan]runs[/]", escape(step.why))
    console.print(table)
    plan = predict(config, read_cluster(config.cluster))
    if plan is not None:
        console.print(f"plan: {summary_line(plan)}", highlight=False, markup=False, soft_wrap=True)
    refuse(plan, config)


def forecast(config: RunConfig) -> list[Forecast]:
    """The steps of a run in order, each found finished or run, with the reason.

    The steps themselves compute what they depend on; `tasks.steps.perform` stops before it runs anything.
    """
    context = RunContext(run_directory(config), config, dry_run=True)
    found: dict[str, StepRecord] = {}
    result = []
    for step, (task, needed) in _STEPS.items():
        waits_for = [name for name in needed if name not in found]
        why = _waiting(context.path, step, waits_for) if waits_for else None
        if why is None and step in ("evaluate", "register") and not _has_registry(config):
            why = "there is no model registry yet"
        if why is None:
            try:
                found[step] = task(context, *(found[name] for name in needed))
                why = ", ".join(found[step].outputs.values())
            except NotFinishedError as needs:
                why = _reason(context.path, needs)
        result.append(Forecast(step, step in found, why))
    return result


def _waiting(directory: Path, step: str, waits_for: list[str]) -> str:
    if not step_file(directory, step).exists():
        return "not run yet"
    return f"unless {' and '.join(waits_for)} {'come' if len(waits_for) > 1 else 'comes'} out as before"


def _reason(directory: Path, needs: NotFinishedError) -> str:
    """Why a step whose inputs are known would run."""
    path = step_file(directory, needs.step)
    if not path.exists():
        return "not run yet"
    try:
        before = read_record(path)
    except (ValueError, TypeError, KeyError, AttributeError):
        return "its record is damaged"
    if before.fingerprint == needs.fingerprint:
        return "its output is no longer there, or no longer whole"
    if before.inputs_fingerprint == needs.inputs_fingerprint:
        return "its code changed"
    return _changes(before.inputs, flatten(needs.inputs)) if before.inputs else "its inputs changed"


def _changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Sentence on the inputs that differ; fingerprints by name only."""
    changed = [key for key in dict.fromkeys([*before, *now]) if before.get(key) != now.get(key)]
    if not changed:
        return "another version of Cherry made it"
    shown = [
        f"{key} changed" if _is_digest(now.get(key)) else f"{key}: {before.get(key)} -> {now.get(key)}"
        for key in changed[:_SHOWN_CHANGES]
    ]
    more = len(changed) - len(shown)
    return "; ".join([*shown, *([f"and {more} more"] if more else [])])


def _is_digest(value: object) -> bool:
    return isinstance(value, str) and len(value) >= 32 and not value.strip("0123456789abcdef")


def _has_registry(config: RunConfig) -> bool:
    """Whether the registry can be asked without making one: that of files is made by the first call."""
    address = connect(config.tracking, config.runs_directory).address
    for scheme in ("json:", "sqlite:///"):
        if address.startswith(scheme):
            return Path(address.removeprefix(scheme)).exists()
    return True
