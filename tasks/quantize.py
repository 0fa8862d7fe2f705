"""Quantize step: weights of the export in the configured format, and the error of every tensor as a report and plots.

What the quantized weights cost in loss is measured by the evaluate step.
"""

from __future__ import annotations

import csv
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE

from base import storage
from model.calibration.names import NEAREST
from model.numerics.formats import AUTO, FORMATS
from model.quantization.manifest import MANIFEST_NAME
from model.quantization.report import REPORT_NAME
from tasks.artifacts import show_table
from tasks.plots import plot_expert_coverage, plot_quantization, plot_quantization_map
from tasks.records.quantized_format import OUTPUT, chosen_format, compared_formats, output_of
from tasks.steps import RunContext, StepRecord, StepRun, make_room, perform, worth_retrying

KINDS_FILE = "quantization_by_kind.csv"


@task(
    name="quantize",
    task_run_name="quantize",
    cache_policy=NO_CACHE,
    retries=2,
    retry_delay_seconds=2,
    retry_condition_fn=worth_retrying,
)
def quantize(context: RunContext, data: StepRecord, exported: StepRecord) -> StepRecord:
    """Record of the quantized weights, made from the export by a program of its own, which goes on where it was.

    A calibration takes the run's training data.
    """
    scheme, reason = chosen_format(context.config)
    inputs: dict[str, Any] = {"export_fingerprint": exported.fingerprint, "format": scheme}
    flags: list[str] = []
    settings = context.config.quantize
    if settings.method != NEAREST:
        tokens = settings.calibration_tokens
        inputs |= {"method": settings.method, "data_fingerprint": data.fingerprint, "calibration_tokens": tokens}
        flags += ["--method", settings.method, "--calibration", data.outputs["data"]]
        flags += [] if tokens is None else ["--calibration-tokens", str(tokens)]
    others = compared_formats(context.config)
    inputs |= {"compare": others} if others else {}

    def work(step: StepRun) -> dict[str, str]:
        if settings.format == AUTO:
            step.say(f"{scheme}, {reason}")
        for name in settings.compare:
            if (rule := FORMATS[name].misfit(context.config.model)) is not None:
                step.say(f"quantize.compare: {name} is left out, for it {rule}")
        outputs = {output_of(name): context.path / output_of(name) for name in others}
        for name in others:
            _quantize(step, exported.outputs["export"], outputs[output_of(name)], name)
        target = context.path / OUTPUT
        _quantize(step, exported.outputs["export"], target, scheme, *flags)
        _publish(step, target)
        return {OUTPUT: str(target)} | {name: str(path) for name, path in outputs.items()}

    return perform(context, "quantize", inputs, work)


def _quantize(step: StepRun, source: str, target: Path, format_name: str, *flags: str) -> None:
    make_room(step.context, "quantize", target, step.fingerprint)
    if not storage.is_committed(str(target)) and not (target / MANIFEST_NAME).exists():
        storage.remove_tree(str(target))  # what is left of a damaged output
    arguments = ["--source", source, "--target", str(target), "--format", format_name, *flags]
    step.run("cherry.calibration.quantize", arguments)


def _publish(step: StepRun, target: Path) -> None:
    """Record the report's figures, plots and tables."""
    report = storage.read_json(str(target / REPORT_NAME))
    ratio = report["bytes_after"] / report["bytes_before"]
    step.metrics(quantized_bytes_ratio=ratio)
    step.tracker.artifact(step.run_id, target / REPORT_NAME)
    errors = [tensor["rel_error"] for tensor in report["tensors"]]
    if not errors:
        return  # bf16
    step.metrics(rel_error_mean=sum(errors) / len(errors), rel_error_max=max(errors))
    plots = [
        plot_quantization(report["tensors"], target / "quantization.png"),
        plot_quantization_map(report["by_layer_and_kind"], target / "quantization_map.png"),
    ]
    if "calibration" in report:
        plots += _publish_coverage(step, report["calibration"], target)
    for path in (write_kinds(report["by_kind"], target / KINDS_FILE), *plots):
        step.tracker.artifact(step.run_id, path)
    for plot in plots:
        step.tracker.artifact(step.context.parent_run_id, plot, "plots")
    name = step.context.config.name
    show_table(f"quantization-{name}", report["by_kind"], f"Quantization error by kind of weight: {name}")


def _publish_coverage(step: StepRun, calibration: Mapping[str, Any], target: Path) -> list[Path]:
    """Plots of how many tokens each expert was calibrated with; the figures go to the tracker and a table."""
    step.metrics(calibration_tokens=calibration["tokens"])
    if not calibration["coverage"]:
        return []  # no routed experts
    keys = ("expert_tokens_least", "expert_tokens_mean", "experts_borrowed")
    step.metrics(**{key: calibration[key] for key in keys})
    name = step.context.config.name
    rows = coverage_rows(calibration["coverage"])
    show_table(f"calibration-{name}", rows, f"Calibration tokens of the experts, by layer: {name}")
    return [plot_expert_coverage(calibration["coverage"], target / "calibration_coverage.png")]


def coverage_rows(coverage: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows of a table, one a layer: tokens of the expert with the fewest, its number, the median, who borrowed."""
    return [
        {
            "layer": layer["layer"],
            "least tokens": min(layer["tokens"]),
            "of expert": layer["tokens"].index(min(layer["tokens"])),
            "median tokens": statistics.median(layer["tokens"]),
            "experts that borrowed": sum(count > 0 for count in layer["borrowed"]),
        }
        for layer in coverage
    ]


def write_kinds(rows: Sequence[Mapping[str, Any]], path: Path) -> Path:
    """Write the report's rows by kind as CSV to `path`."""
    with path.open("w", newline="", encoding="utf-8") as handle:
        table = csv.DictWriter(handle, list(rows[0]))
        table.writeheader()
        table.writerows(rows)
    return path
