"""Rules of the run's configuration that no other file's tests hold."""

from __future__ import annotations

import pytest

from base.config import validate
from base.errors import ConfigError
from tasks.run_config import TrackingConfig


@pytest.mark.parametrize(
    "uri",
    [
        *("mlruns", "/srv/mlruns", "json:", "json:/srv/runs", "file:///srv/mlruns", "sqlite:///runs/mlflow.db"),
        *("postgresql+psycopg2://host/db", "http://tracking:5000", "databricks", "databricks://profile"),
    ],
)
def test_tracking_uris_of_mlflow_and_of_the_json_tracker(uri: str) -> None:
    assert validate({"uri": uri}, TrackingConfig, origin="run.yaml").uri == uri


def test_a_scheme_that_no_tracker_has_is_refused_before_anything_runs() -> None:
    with pytest.raises(ConfigError, match=r"uri: must be .* schemes json, .*https.* \(got 'jsn:foo'\)"):
        validate({"uri": "jsn:foo"}, TrackingConfig, origin="run.yaml")
