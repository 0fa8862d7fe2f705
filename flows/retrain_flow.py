"""Owns the order of a retraining: train under the day's name, and release what is better than the champion.

It knows nothing of what a step does. Started again on the same day, or by Prefect after a crash, it goes on.
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
    """Train on the documents of today; the headline figures, and the release's URL when there was one.

    Args:
        config: path of a YAML config.
        overrides: keys of the config, nested, that win over the file.
        release: serve the new version when it is better than the champion.
    """
    today = dated(resolve(config, overrides), runtime.flow_run.scheduled_start_time.date())
    summary = train_flow(today)
    if release and summary["verdict"] == "better":
        summary |= deploy_flow(today)
    return summary
