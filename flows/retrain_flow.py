"""The retraining flow: a training run with the day in its name, and a release when it is better than the champion.

Started again on the same day, or by Prefect after a crash, it resumes the day's run.
"""

from __future__ import annotations

from typing import Any

from prefect import flow, runtime

from flows.deploy_flow import deploy_flow
from flows.train_flow import train_flow
from tasks.interruptions.states import describe
from tasks.overrides import DEFAULT_CONFIG, NO_OVERRIDES, ConfigParameter, Overrides, dated, resolve
from tasks.records.run_names import name_next_runs, retraining_name
from tasks.run_logger import run_logger


@flow(
    name="retrain-flow",
    flow_run_name=retraining_name,
    on_cancellation=[describe],
    on_crashed=[describe],
    validate_parameters=True,
)
def retrain_flow(
    config: ConfigParameter = DEFAULT_CONFIG, overrides: Overrides = NO_OVERRIDES, release: bool = False
) -> dict[str, Any]:
    """Train on today's documents; returns the summary, with whether it was released, and the release's URL if so.

    Args:
        config: path of a YAML config.
        overrides: keys of the config, nested, that win over the file.
        release: serve the new version if it has become the champion.
    """
    name_next_runs()
    today = dated(resolve(config, overrides), runtime.flow_run.scheduled_start_time.date())
    summary = train_flow(today)
    released = release and summary["champion"]
    if released:
        summary |= deploy_flow(today)
    elif release:
        run_logger().warning("nothing was released: %s", summary["champion_reason"])
    return {**summary, "released": released}
