"""Quantize step: weights of the export in the configured format, and the error of every tensor as a report and a plot.

What the quantized weights cost in loss is measured by the evaluate step.
"""

from __future__ import annotations

from prefect import task
from prefect.cache_policies import NO_CACHE

from base import storage
from tasks.plots import plot_quantization
from tasks.steps import RunContext, StepRecord, StepRun, make_room, perform, worth_retrying


@task(
    name="quantize",
    task_run_name="quantize",
    cache_policy=NO_CACHE,
    retries=2,
    retry_delay_seconds=2,
    retry_condition_fn=worth_retrying,
)
def quantize(context: RunContext, exported: StepRecord) -> StepRecord:
    """Record of the quantized weights, made from the export by a program of its own."""
    scheme = context.config.quantize.format

    def work(step: StepRun) -> dict[str, str]:
        source, target = exported.outputs["export"], context.path / "quantized"
        make_room(context, "quantize", target, step.fingerprint)
        step.run("model.quantize", ["--source", source, "--target", str(target), "--format", scheme])
        report_file = target / "quantization.json"
        report = storage.read_json(str(report_file))
        ratio = report["bytes_after"] / report["bytes_before"]
        errors = [tensor["rel_error"] for tensor in report["tensors"]]
        step.metrics(quantized_bytes_ratio=ratio, rel_error_mean=sum(errors) / len(errors), rel_error_max=max(errors))
        plot = plot_quantization(report["tensors"], target / "quantization.png")
        for path in (report_file, plot):
            step.tracker.artifact(step.run_id, path)
        step.tracker.artifact(context.parent_run_id, plot, "plots")
        return {"quantized": str(target)}

    inputs = {"export_fingerprint": exported.fingerprint, "format": scheme}
    return perform(context, "quantize", inputs, work)
