"""Owns the order of a release: resolve the version, start, smoke, shift, record.

It knows nothing of what a step does. A breach puts traffic back where it was, so nothing here is retried blindly.
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
    """Serve a registered version behind the gateway; its URL, version and the file with the clients' key.

    Args:
        config: path of the YAML config that the run was made with.
        overrides: keys of the config, nested, that win over the file.
        version: a registered version; `None` goes by the alias.
        alias: of a registered version; with neither it is the version that this run registered, or the candidate when
            it has none, and one that was judged worse is refused.
    """
    context = begin_release(config, overrides)
    release = resolve_version(context, version, alias)
    replica = start(context, release)
    answer = smoke(context, replica)
    shifted = shift(context, replica)
    return record(context, release, replica, shifted, answer)
