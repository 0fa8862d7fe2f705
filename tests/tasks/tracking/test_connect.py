"""Which tracker a config and the environment name."""

from __future__ import annotations

from pathlib import Path

import pytest

from tasks.run_config import TrackingConfig
from tasks.tracking.connect import connect
from tasks.tracking.json_tracker import JsonTracker
from tasks.tracking.mlflow_tracker import MlflowTracker


def test_a_json_uri_is_the_tracker_of_files_and_any_other_mlflow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    default = connect(TrackingConfig(), str(tmp_path))
    assert isinstance(default, MlflowTracker)
    assert default.page() == f"mlflow ui --backend-store-uri sqlite:///{tmp_path}/mlflow.db --port 5000"
    server = connect(TrackingConfig(uri="http://me:secret@tracking:5000"), str(tmp_path))
    assert server.address == server.page() == "http://***@tracking:5000"
    own = connect(TrackingConfig(uri="json:"), str(tmp_path))
    assert isinstance(own, JsonTracker)
    assert (own.address, own.page()) == (f"json:{tmp_path}/tracking", f"{tmp_path}/tracking")
    shared = connect(TrackingConfig(uri=f"json:{tmp_path}/shared"), "elsewhere")
    assert shared.address == f"json:{tmp_path}/shared"
    assert connect(TrackingConfig(uri="json:"), str(tmp_path)) is own
