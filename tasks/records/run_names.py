"""Names of Prefect flow runs: the run's own, after what the flow does with it."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import date
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx
from prefect import runtime
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import FlowRunFilter

from tasks.run_logger import run_logger


def run_name() -> str:
    """Name of a training's flow run: the run's own where the parameters give it, else that of the config file."""
    return _named(runtime.flow_run.parameters)


def release_name() -> str:
    """Name of a release's flow run, like `deploy tiny`."""
    return f"deploy {_named(runtime.flow_run.parameters)}"


def retraining_name() -> str:
    """Name of a retraining's flow run, like `retrain tiny-20261130`, with the day that it was due."""
    return _retraining(runtime.flow_run.parameters, runtime.flow_run.scheduled_start_time.date())


def name_next_runs() -> None:
    """Name the scheduled runs of this flow run's deployment, if it has one; best effort."""
    deployment_id = runtime.deployment.id
    if deployment_id is None:
        return
    try:
        with get_client(sync_client=True) as client:
            name_scheduled(client, UUID(str(deployment_id)))
    except (httpx.HTTPError, RuntimeError) as error:
        run_logger().warning("the next scheduled runs keep the names that Prefect gave them: %s", error)


def name_scheduled(client: SyncPrefectClient, deployment_id: UUID) -> list[str]:
    """Names that the scheduled retrainings of a deployment have now: the server gives them random ones.

    It makes the runs of the next weeks ahead of time.
    """
    scheduled = FlowRunFilter.model_validate(
        {"deployment_id": {"any_": [deployment_id]}, "state": {"type": {"any_": ["SCHEDULED"]}}}
    )
    names = []
    for flow_run in client.read_flow_runs(flow_run_filter=scheduled):
        if flow_run.auto_scheduled and flow_run.expected_start_time is not None:
            names.append(_retraining(flow_run.parameters, flow_run.expected_start_time.date()))
            if flow_run.name != names[-1]:
                client.update_flow_run(flow_run.id, name=names[-1])
    return sorted(names)


def _retraining(parameters: Mapping[str, Any], day: date) -> str:
    return f"retrain {_named(parameters)}-{day:%Y%m%d}"


def _named(parameters: Mapping[str, Any]) -> str:
    for given in (parameters.get("overrides"), parameters.get("config")):
        name = given.get("name") if isinstance(given, Mapping) else getattr(given, "name", None)
        if name is not None:
            return str(name)
    return Path(str(parameters.get("config", ""))).stem
