"""`cherry compare`: two runs side by side: what their configs differ in, and what came of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from anything.statistics.compare import Losses, compare
from base.errors import ConfigError, InvalidInputError, MissingFileError
from base.yaml_config import parse_yaml
from cherry.cluster import read_cluster
from flows.runs.status import RunStatus, read_run, read_values
from tasks.run_config import EvaluateConfig
from tasks.steps import flatten

_SCORES = Path("evaluate") / "nll-candidate.json"
_HOUR_S = 3600.0
# What differs between any two runs and explains nothing.
_OWN_KEYS = ("name", "runs_directory", "register_model.model_name")


def show_comparison(console: Console, runs_directory: Path, first: str, second: str, *, as_json: bool) -> None:
    """Print the comparison of two runs.

    Raises:
        MissingFileError: one of them does not exist.
    """
    found = compare_runs(runs_directory, first, second)
    if as_json:
        print(json.dumps(found, indent=2))
        return
    for title, rows in (("config", found["config"]), ("figures", found["figures"])):
        table = Table(box=None, pad_edge=False)
        for heading in (f"\n{title}", f"\n{escape(first)}", f"\n{escape(second)}"):
            table.add_column(heading, overflow="fold")
        for key, values in rows.items():
            table.add_row(key, *(escape(_readable(value)) for value in values))
        console.print(table if rows else f"\n[bold]{title}[/]: no difference")
    console.print(f"\n{found['held_out']['text']}", highlight=False, markup=False)


def compare_runs(runs_directory: Path, first: str, second: str) -> dict[str, Any]:
    """JSON values: `config` and `figures` with a pair of values by name, and `held_out`, the difference in loss.

    `held_out` has `difference`, `low` and `high` in nats per token, second minus first, where both runs scored the same
    documents; else null. `text` says it in a sentence.

    Raises:
        MissingFileError: one of the runs does not exist.
    """
    runs = [read_run(runs_directory, name) for name in (first, second)]
    configs = [_config(run.directory) for run in runs]
    figures = [_figures(run, config) for run, config in zip(runs, configs, strict=True)]
    names = dict.fromkeys([*figures[0], *figures[1]])
    return {
        "runs": [run.name for run in runs],
        "config": {
            key: [config.get(key) for config in configs]
            for key in dict.fromkeys([*configs[0], *configs[1]])
            if key not in _OWN_KEYS and configs[0].get(key) != configs[1].get(key)
        },
        "figures": {name: [values.get(name) for values in figures] for name in names},
        "held_out": _difference(runs[0].directory, runs[1].directory, configs[1]),
    }


def _config(directory: Path) -> dict[str, Any]:
    """The run's resolved config with dotted keys; empty when it cannot be read."""
    path = directory / "config.yaml"
    try:
        values = parse_yaml(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError, ConfigError, yaml.YAMLError):
        return {}
    return flatten(values) if isinstance(values, dict) else {}


def _figures(run: RunStatus, config: dict[str, Any]) -> dict[str, Any]:
    """Figures by name; what a run does not have yet is left out."""
    train, evaluation = (
        read_values(run.directory / name) for name in ("train/result.json", "evaluate/evaluation.json")
    )
    found: dict[str, Any] = {
        "state": run.state,
        "verdict": run.verdict,
        "held-out loss, nats per token": evaluation.get("heldout_loss"),
        "held-out bits per byte": run.heldout_bits_per_byte,
        "loss of the last step": train.get("loss_last", run.loss),
        "quantization's cost, nats per token": evaluation.get("quantized_dnll"),
        "parameters": train.get("parameters"),
        "tokens": train.get("tokens"),
        "tokens per second": train.get("tokens_per_second"),
        "peak memory, GiB": train.get("peak_memory_gib"),
    }
    found |= {f"seconds of {step}": round(seconds, 1) for step, seconds in run.finished.items()}
    return {name: value for name, value in (found | _cost(run, config)).items() if value is not None}


def _cost(run: RunStatus, config: dict[str, Any]) -> dict[str, float]:
    """Price of the finished steps' GPU hours, where the cluster file has one: all hosts are held from step to step."""
    try:
        spec = read_cluster(str(config.get("cluster", "local")))
    except (ConfigError, MissingFileError):  # changed or removed since
        return {}
    if spec.price_per_gpu_hour is None:
        return {}
    ranks = int(config.get("launch.nnodes", 1)) * int(config.get("launch.nproc_per_node", 1))
    hours = ranks * sum(run.finished.values()) / _HOUR_S
    return {f"cost, {spec.currency}": round(hours * spec.price_per_gpu_hour, 4)}


def _difference(first: Path, second: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Difference of the held-out losses with its interval, by the rules of the second run's `evaluate` section."""
    losses = [_losses(directory) for directory in (first, second)]
    keys = ("confidence", "bootstrap_samples", "seed")
    rules = {key: config.get(f"evaluate.{key}", getattr(EvaluateConfig(), key)) for key in keys}
    margin = float(config.get("evaluate.margin_nats", EvaluateConfig().margin_nats))
    missing: dict[str, Any] = dict.fromkeys(("difference", "low", "high", "documents", "verdict"))
    unscored = [directory.name for directory, scores in zip((first, second), losses, strict=True) if not scores]
    if unscored:
        return missing | {"text": f"held-out losses cannot be compared: {' and '.join(unscored)} has no scores yet"}
    try:
        found = compare(losses[0], losses[1], margin=margin, **rules)
    except InvalidInputError as error:
        return missing | {"text": f"held-out losses cannot be compared: {error}"}
    return {
        "difference": found.difference,
        "low": found.low,
        "high": found.high,
        "documents": found.documents,
        "verdict": found.verdict,
        "text": f"{second.name} against {first.name}: {found.verdict}. {found.reason}",
    }


def _losses(directory: Path) -> Losses:
    """Losses by document of the run's exported weights; empty when they were not scored."""
    documents = read_values(directory / _SCORES).get("documents", [])
    return {str(one["id"]): (float(one["nll"]), int(one["tokens"])) for one in documents}


def _readable(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool | str):
        return str(value)
    return (
        f"{value:,}" if isinstance(value, int) else f"{value:,.5g}" if isinstance(value, float) else json.dumps(value)
    )
