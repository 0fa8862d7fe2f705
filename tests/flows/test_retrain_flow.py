"""The retraining flow: the day in the run's name, and a release of what is better, if one is asked for."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest
from prefect.exceptions import ParameterTypeError

from flows import retrain_flow as module
from flows.retrain_flow import retrain_flow
from tasks.run_config import RunConfig


@pytest.mark.parametrize(
    ("release", "champion", "released"),
    [(True, True, True), (False, True, False), (True, False, False), (False, False, False)],
)
def test_only_what_became_champion_is_released_and_only_when_asked_for(
    release: bool, champion: bool, released: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Stand-ins record what the two flows are given; tests/e2e runs the flows."""
    names: list[str] = []

    def train(config: RunConfig) -> dict[str, Any]:
        names.append(config.name)
        return {"name": config.name, "verdict": "better", "champion": champion, "champion_reason": "a rival"}

    def deploy(config: RunConfig) -> dict[str, Any]:
        names.append(config.name)
        return {"url": "http://127.0.0.1:1"}

    monkeypatch.setattr(module, "train_flow", train)
    monkeypatch.setattr(module, "deploy_flow", deploy)
    before = datetime.now(UTC)
    summary = retrain_flow.fn("configs/tiny.yaml", release=release)
    days = {f"tiny-{day:%Y%m%d}" for day in (before, datetime.now(UTC))}
    assert summary["name"] in days
    assert names == [summary["name"]] * (1 + released)
    assert ("url" in summary) is summary["released"] is released
    assert ("nothing was released: a rival" in caplog.text) is (release and not champion)


@pytest.mark.parametrize("wrong", [{"release": "maybe"}, {"overrides": {"trian": {}}}, {"day": "2026-03-09"}])
def test_a_wrong_parameter_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises((ParameterTypeError, TypeError)):
        retrain_flow.validate_parameters({"config": "configs/tiny.yaml", **wrong})
