"""The deployment flow: resolve the version, start a replica, smoke test, shift traffic, record.

A breach rolls the traffic back, so no step is retried.
"""

from __future__ import annotations

from typing import Any

from prefect import flow

from tasks.deploy import record, resolve_version, shift, smoke, start
from tasks.lifecycle import begin_release, run_name
from tasks.overrides import DEFAULT_CONFIG, NO_OVERRIDES, ConfigParameter, Overrides


@flow(name="deploy-flow", flow_run_name=run_name, validate_parameters=True)
def deploy_flow(
    config: ConfigParameter = DEFAULT_CONFIG,
    overrides: Overrides = NO_OVERRIDES,
    version: int | None = None,
    alias: str | None = None,
) -> dict[str, Any]:
    """Serve a registered version behind the gateway; returns its URL, version and the file with the clients' key.

    Args:
        config: path of the YAML config that the run was made with.
        overrides: keys of the config, nested, that win over the file.
        version: a registered version; `None` goes by the alias.
        alias: alias of a registered version. With neither, the version that this run registered is served, or the
            candidate if it registered none; one that was judged worse is refused.
    """
    context = begin_release(config, overrides)
    release = resolve_version(context, version, alias)
    replica = start(context, release)
    answer = smoke(context, replica)
    shifted = shift(context, replica)
    return record(context, release, replica, shifted, answer)
