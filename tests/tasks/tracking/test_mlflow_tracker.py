"""Runs in MLflow: limits of its requests, and the code that a run is tagged with."""

from __future__ import annotations

import pytest

from tasks.tracking.mlflow_tracker import MlflowTracker

pytestmark = pytest.mark.slow


def test_a_parameter_longer_than_a_request_takes_is_cut(tracker: MlflowTracker) -> None:
    run_id = tracker.runs.start("values", parent=None, step="data", identity="f", run_key="k")
    tracker.runs.log(run_id, params={"long": "x" * 9000})
    assert len(tracker._connection.get()[0].get_run(str(run_id)).data.params["long"]) == 6000


def test_an_installed_package_is_its_version_and_digest(tracker: MlflowTracker) -> None:
    run_id = tracker.runs.start("code", parent=None, step="data", identity="f", run_key="k")
    tags = tracker._connection.get()[0].get_run(str(run_id)).data.tags
    assert (tags["cherry.version"], tags["cherry.code_digest"]) == ("9.9", "d" * 64)
    assert tags["mlflow.source.type"] == "LOCAL"
    assert not [key for key in tags if "git" in key]
