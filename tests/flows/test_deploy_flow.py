"""The deployment flow's parameters, as Prefect checks them before a run exists."""

from __future__ import annotations

from typing import Any

import pytest
from prefect.exceptions import ParameterTypeError
from prefect.utilities.callables import parameter_schema

from flows.deploy_flow import deploy_flow
from tasks.overrides import Overrides, resolve


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"version": "newest"}, "version"),
        ({"alias": 3}, "alias"),
        ({"overrides": {"deploy": {"traffic": [100]}}}, "deploy.traffic"),
        ({"overrides": {"deploy": {"max_error_rate": "none"}}}, "deploy.max_error_rate"),
    ],
)
def test_a_wrong_parameter_is_refused_by_its_name(wrong: dict[str, Any], named: str) -> None:
    with pytest.raises(ParameterTypeError, match=named):
        deploy_flow.validate_parameters({"config": "configs/tiny.yaml", **wrong})


def test_parameters_of_the_api_and_a_resolved_config_are_taken() -> None:
    config = resolve("configs/tiny.yaml")
    taken = deploy_flow.validate_parameters({"config": config, "version": 3})
    assert (taken["config"], taken["version"]) == (config, 3)
    overrides = {"deploy": {"traffic_steps_percent": [5, 100]}}
    taken = deploy_flow.validate_parameters({"config": "configs/tiny.yaml", "overrides": overrides})
    assert taken["overrides"] == Overrides.model_validate(overrides)


def test_the_api_describes_every_parameter() -> None:
    properties = parameter_schema(deploy_flow).properties
    assert set(properties) == {"config", "overrides", "version", "alias"}
    assert all(properties[name].get("description") for name in properties)
