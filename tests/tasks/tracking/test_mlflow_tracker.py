"""What is MLflow's own: where it is, limits of its requests, its pages, and connecting beside other work."""

from __future__ import annotations

import threading
import warnings
from pathlib import Path

import pytest

from base.errors import OperationalError
from tasks.code_version import CodeVersion
from tasks.run_config import TrackingConfig
from tasks.tracking.mlflow_connection import MlflowConnection, tracking_uri
from tasks.tracking.mlflow_tracker import MlflowTracker

pytestmark = pytest.mark.slow
INSTALLED = CodeVersion("9.9", "d" * 64, None)


@pytest.fixture(scope="module")
def tracker(tmp_path_factory: pytest.TempPathFactory) -> MlflowTracker:
    folder = tmp_path_factory.mktemp("runs")
    made = MlflowTracker(TrackingConfig(uri=f"sqlite:///{folder}/mlflow.db"), str(folder), INSTALLED)
    with warnings.catch_warnings():
        # MLflow's modules and tables use what others have deprecated, which shows when they are first used.
        warnings.simplefilter("ignore")
        assert made.runs.start("warm", parent=None, step="flow", identity="0", run_key="k") is not None
    return made


def test_where_runs_are_recorded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert tracking_uri(TrackingConfig(), str(tmp_path)) == f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://tracking:5000")
    assert tracking_uri(TrackingConfig(), str(tmp_path)) == "http://tracking:5000"
    assert tracking_uri(TrackingConfig(uri="http://mine:1"), str(tmp_path)) == "http://mine:1"


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


def test_a_version_is_a_logged_model_that_shows_where_it_is_registered(tracker: MlflowTracker) -> None:
    made = tracker.runs.start("made", parent=None, step="register", identity="f", run_key="k")
    version = tracker.registry.register(made, "linked", "/runs/a/export", identity="i", alias="candidate", tags={})
    assert version.model_id is not None and "models:/" not in version.model_id
    model = tracker._connection.get()[0].get_logged_model(version.model_id)
    assert '"linked"' in model.tags["mlflow.modelVersions"]


def test_connecting_early_leaves_what_the_first_call_needs_and_keeps_an_outage_to_itself(
    tracker: MlflowTracker, tmp_path: Path
) -> None:
    uris = (f"sqlite:///{tmp_path}/mlflow.db", "http://127.0.0.1:9")
    connections = [MlflowConnection(TrackingConfig(uri=uri), str(tmp_path)) for uri in uris]
    for connection in connections:
        connection.connect_early()
    for thread in threading.enumerate():
        if thread.name == "mlflow":
            thread.join()
    connected = connections[0].connected
    assert connected is not None and connections[0].get() is connected
    assert connections[1].connected is None


def test_an_outage_of_the_registry_says_what_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    down = MlflowTracker(TrackingConfig(uri="http://127.0.0.1:9"), str(tmp_path), INSTALLED)
    with pytest.raises(OperationalError, match="registry could not version"):
        down.registry.version("net", alias="champion")
