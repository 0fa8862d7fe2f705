"""The deployment flow: resolve the version, start a replica, smoke test, shift traffic, record.

A breach rolls the traffic back, so no step is retried.
"""

from __future__ import annotations

from typing import Any

from prefect import flow

from tasks.deploy import record, releasing, resolve_version, shift, smoke, start
from tasks.interruptions.states import describe
from tasks.lifecycle import begin_release
from tasks.overrides import DEFAULT_CONFIG, NO_OVERRIDES, ConfigParameter, Overrides
from tasks.records.run_names import release_name


@flow(
    name="deploy-flow",
    flow_run_name=release_name,
    on_cancellation=[describe],
    on_crashed=[describe],
    validate_parameters=True,
)
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
            candidate if it registered none; it is refused where a better version would be replaced.
    """
    context = begin_release(config, overrides)
    release = resolve_version(context, version, alias)
    with releasing(context, release) as (context, release):
        replica = start(context, release)
        answer = smoke(context, release, replica)
        shifted = shift(context, release, replica)
        return record(context, release, replica, shifted, answer)
