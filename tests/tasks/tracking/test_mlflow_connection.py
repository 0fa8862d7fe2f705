"""Where MLflow is, and connecting to it beside other work."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from tasks.run_config import TrackingConfig
from tasks.tracking.mlflow_connection import MlflowConnection, tracking_uri
from tasks.tracking.mlflow_tracker import MlflowTracker


def test_where_runs_are_recorded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert tracking_uri(TrackingConfig(), str(tmp_path)) == f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://tracking:5000")
    assert tracking_uri(TrackingConfig(), str(tmp_path)) == "http://tracking:5000"
    assert tracking_uri(TrackingConfig(uri="http://mine:1"), str(tmp_path)) == "http://mine:1"


@pytest.mark.slow
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
