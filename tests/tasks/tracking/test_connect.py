"""Which tracker a config and the environment name."""

from __future__ import annotations

from pathlib import Path

import pytest

from base.errors import ServiceError
from tasks.run_config import TrackingConfig
from tasks.tracking.connect import check_tracking_servers, connect
from tasks.tracking.json_tracker import JsonTracker
from tasks.tracking.mlflow_tracker import MlflowTracker


def test_a_json_uri_is_the_tracker_of_files_and_any_other_mlflow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    default = connect(TrackingConfig(), str(tmp_path))
    assert isinstance(default, MlflowTracker)
    assert default.page() == (
        f"mlflow ui --backend-store-uri sqlite:///{tmp_path}/mlflow.db --port 5000 --workers 1  # http://127.0.0.1:5000"
    )
    server = connect(TrackingConfig(uri="http://me:secret@tracking:5000"), str(tmp_path))
    assert server.address == server.page() == "http://***@tracking:5000"
    own = connect(TrackingConfig(uri="json:"), str(tmp_path))
    assert isinstance(own, JsonTracker)
    assert (own.address, own.page()) == (f"json:{tmp_path}/tracking", f"{tmp_path}/tracking")
    shared = connect(TrackingConfig(uri=f"json:{tmp_path}/shared"), "elsewhere")
    assert shared.address == f"json:{tmp_path}/shared"
    assert connect(TrackingConfig(uri="json:"), str(tmp_path)) is own


def test_only_servers_are_asked_whether_they_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for uri in (None, "json:", f"sqlite:///{tmp_path}/none/mlflow.db"):
        check_tracking_servers(TrackingConfig(uri=uri), str(tmp_path))
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ServiceError, match="no MLflow server answers at http://127"):
        check_tracking_servers(TrackingConfig(uri="http://127.0.0.1:9"), str(tmp_path))
    monkeypatch.setenv("MLFLOW_REGISTRY_URI", "http://127.0.0.1:9")
    with pytest.raises(ServiceError, match="MLFLOW_REGISTRY_URI"):
        check_tracking_servers(TrackingConfig(), str(tmp_path))
