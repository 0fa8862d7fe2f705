"""Names of flow runs from their parameters; tests/e2e/test_deployments.py sees those that a server's scheduler made."""

from __future__ import annotations

from datetime import date
from typing import Any

import pytest

from tasks.overrides import Overrides, resolve
from tasks.records.run_names import _named, _retraining


@pytest.mark.parametrize(
    ("parameters", "name"),
    [
        ({"config": "configs/tiny.yaml"}, "tiny"),
        ({"config": "configs/tiny.yaml", "overrides": {"name": "mine"}}, "mine"),
        ({"config": "configs/tiny.yaml", "overrides": Overrides(name="mine")}, "mine"),
        ({"config": "configs/tiny.yaml", "overrides": Overrides()}, "tiny"),
        ({"config": {"name": "resolved"}}, "resolved"),
        ({"config": resolve("configs/tiny.yaml", {"name": "resolved"})}, "resolved"),
        ({}, ""),
    ],
)
def test_a_run_is_named_by_its_parameters(parameters: dict[str, Any], name: str) -> None:
    assert _named(parameters) == name


def test_a_retraining_says_so_with_its_day() -> None:
    assert _retraining({"config": "configs/tiny.yaml"}, date(2026, 11, 30)) == "retrain tiny-20261130"
