"""The retraining flow: a training run with the day in its name, and a release when it is better than the champion.

Started again on the same day, or by Prefect after a crash, it resumes the day's run.
"""

from __future__ import annotations

from typing import Any

from prefect import flow, runtime

from flows.deploy_flow import deploy_flow
from flows.train_flow import train_flow
from tasks.lifecycle import run_name
from tasks.overrides import DEFAULT_CONFIG, NO_OVERRIDES, ConfigParameter, Overrides, dated, resolve


@flow(name="retrain-flow", flow_run_name=run_name, validate_parameters=True)
def retrain_flow(
    config: ConfigParameter = DEFAULT_CONFIG, overrides: Overrides = NO_OVERRIDES, release: bool = False
) -> dict[str, Any]:
    """Train on today's documents; returns the summary, with the release's URL if there was one.

    Args:
        config: path of a YAML config.
        overrides: keys of the config, nested, that win over the file.
        release: serve the new version if it is better than the champion.
    """
    today = dated(resolve(config, overrides), runtime.flow_run.scheduled_start_time.date())
    summary = train_flow(today)
    if release and summary["verdict"] == "better":
        summary |= deploy_flow(today)
    return summary
