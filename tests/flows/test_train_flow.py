"""The training flow's parameters, as Prefect's API shows and checks them, and what ends a run from outside."""

from __future__ import annotations

from typing import Any

import pytest
from prefect.exceptions import ParameterTypeError
from prefect.utilities.callables import parameter_schema

from flows.train_flow import train_flow
from tasks.lifecycle import teardown


def test_the_api_offers_a_flow_a_path_and_no_resolved_config() -> None:
    properties = parameter_schema(train_flow).properties
    assert properties["config"]["type"] == "string"
    assert "anyOf" not in properties["config"]


@pytest.mark.parametrize(
    ("overrides", "named"),
    [({"trian": {}}, "trian"), ({"train": {"learning_rte": 0.1}}, "train.learning_rte"), ({"train": 3}, "train")],
)
def test_a_wrong_override_is_refused_by_its_name(overrides: dict[str, Any], named: str) -> None:
    with pytest.raises(ParameterTypeError, match=named):
        train_flow.validate_parameters({"config": "configs/tiny.yaml", "overrides": overrides})


def test_a_flow_that_ends_from_outside_is_torn_down_and_no_flow_is_retried() -> None:
    assert train_flow.on_cancellation_hooks == train_flow.on_crashed_hooks == [teardown]
    assert train_flow.retries == 0
