"""MLflow's model registry: logged models of versions, and outages."""

from __future__ import annotations

from pathlib import Path

import pytest

from base.errors import OperationalError
from tasks.code_version import CodeVersion
from tasks.run_config import TrackingConfig
from tasks.tracking.mlflow_tracker import MlflowTracker

pytestmark = pytest.mark.slow


def test_a_version_is_a_logged_model_that_shows_where_it_is_registered(tracker: MlflowTracker) -> None:
    made = tracker.runs.start("made", parent=None, step="register", identity="f", run_key="k")
    version = tracker.registry.register(made, "linked", "/runs/a/export", identity="i", alias="candidate", tags={})
    assert version.model_id is not None and "models:/" not in version.model_id
    model = tracker._connection.get()[0].get_logged_model(version.model_id)
    assert '"linked"' in model.tags["mlflow.modelVersions"]


def test_an_outage_of_the_registry_says_what_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    down = MlflowTracker(TrackingConfig(uri="http://127.0.0.1:9"), str(tmp_path), CodeVersion("9.9", "d" * 64, None))
    with pytest.raises(OperationalError, match="registry could not version"):
        down.registry.version("net", alias="champion")
