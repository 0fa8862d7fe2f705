"""The plan of a run: checked before hosts are taken, recorded, and compared with what was measured."""

from __future__ import annotations

import logging
from pathlib import Path

from base import storage
from base.errors import ConfigError, DoesNotFitError, MissingFileError
from cherry.cluster import LOCAL, ClusterSpec
from cherry.planner.local_device import local_device
from cherry.planner.plan import Plan, make_plan
from cherry.planner.report import advice, headline, memory_title, sections_of, summary_line
from cherry.planner.search import nearest_that_fit
from tasks.artifacts import show_table
from tasks.plots import plot_memory
from tasks.run_config import RunConfig
from tasks.steps import RunContext, StepRun

logger = logging.getLogger(__name__)
PLAN_FILE = "plan.json"
# Measured figure by the prediction that it is compared with.
_MEASURED = {
    "predicted_step_seconds": "step_seconds_mean",
    "predicted_tokens_per_second": "tokens_per_second",
    "predicted_peak_memory_gib": "peak_memory_gib",
}


def predict(config: RunConfig, cluster: ClusterSpec) -> Plan | None:
    """Plan of the run; `None` where the planner does not know the GPUs, the local device, or such a use of it."""
    if cluster.kind != LOCAL:
        return None if cluster.gpu is None else make_plan(config, cluster)
    try:
        return make_plan(config, cluster, local_device() if cluster.gpu is None else None)
    except ConfigError as error:  # another GPU, or bf16 on CPUs, which train in it, slowly
        logger.warning("no plan: %s", error)
        return None


def refuse(plan: Plan | None, config: RunConfig) -> None:
    """Check that the plan fits into memory; with `plan.refuse: false`, only log a warning.

    Raises:
        DoesNotFitError: it does not fit.
    """
    if plan is None or plan.fits:
        return
    reason = f"{plan.why_not()}\n{advice(nearest_that_fit(plan))}"
    if config.plan.refuse:
        raise DoesNotFitError(f"{reason}\nplan.refuse=false starts it anyway.")
    logger.warning("%s\nContinuing: plan.refuse is false.", reason)


def record_plan(plan: Plan, context: RunContext, step: StepRun) -> dict[str, str]:
    """The step's outputs, after writing plan.json, plotting it, and logging it to Prefect and MLflow."""
    target = context.path / PLAN_FILE
    storage.write_json(str(target), plan.as_dict())
    path = context.path / "plots" / "plan_memory.png"
    picture = plot_memory(plan.worst.stages, plan.worst.usable, path, title=memory_title(plan))
    step.say(f"plan: {summary_line(plan)}")
    step.metrics(**plan.predictions())
    for run_id in (step.run_id, context.parent_run_id):
        step.tracker.artifact(run_id, target)
        step.tracker.artifact(run_id, picture, "plots")
    rows = [
        {"section": title, "what": row.name, "value": row.value, "note": row.note}
        for title, section in sections_of(plan)
        for row in section
    ]
    show_table(f"plan-{context.config.name}", rows, headline(plan))
    return {"plan": str(target)}


def compared(run_directory: Path, result: dict[str, float]) -> dict[str, float]:
    """Predictions, and the ratios of measured to predicted figures, by name; empty without a plan.

    Args:
        result: the figures of train/result.json.
    """
    try:
        plan = storage.read_json(str(run_directory / PLAN_FILE))
    except MissingFileError:
        return {}
    pairs = {key: (plan.get(key), result.get(measured)) for key, measured in _MEASURED.items()}
    ratios = {
        key.replace("predicted_", "") + "_over_plan": measured / predicted
        for key, (predicted, measured) in pairs.items()
        if predicted and measured
    }
    return {key: plan[key] for key in _MEASURED if key in plan} | ratios


def planned_step_seconds(run_directory: Path) -> float | None:
    """Predicted time of a training step in seconds; `None` without a plan."""
    try:
        found = storage.read_json(str(run_directory / PLAN_FILE)).get("predicted_step_seconds")
    except MissingFileError:
        return None
    return float(found) if found else None
