"""Where MLflow is, and connecting to it beside other work."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from base.errors import AuthenticationError, CherryError, ConfigError, MissingFileError, ServiceError
from tasks.code_version import CodeVersion
from tasks.records.figures import GROUPS, HEADLINE
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


def opened(uri: str | None, folder: Path, **more: str) -> MlflowTracker:
    tracker = MlflowTracker(TrackingConfig(uri=uri, **more), str(folder), CodeVersion("9.9", "d" * 64, None))
    tracker.open(lambda line: None)
    return tracker


def test_a_server_that_is_away_is_told_before_anything_is_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ServiceError, match=r"no MLflow server answers at http://\*\*\*@127.0.0.1:9 .*tracking.uri"):
        opened("http://me:secret@127.0.0.1:9", tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    with pytest.raises(ServiceError, match="MLFLOW_TRACKING_URI; without one, runs are recorded in a database"):
        opened(None, tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "gopher://tracking")
    with pytest.raises(ConfigError, match=r"MLFLOW_TRACKING_URI: must be a directory or a URI .*'gopher://tracking'"):
        opened(None, tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    monkeypatch.setenv("MLFLOW_REGISTRY_URI", "http://127.0.0.1:9")
    with pytest.raises(ServiceError, match="MLFLOW_REGISTRY_URI"):
        opened(None, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("status", "kind", "told"),
    [(404, ServiceError, "HTTP 404"), (401, AuthenticationError, "MLFLOW_TRACKING_USERNAME"), (200, CherryError, "")],
)
def test_a_server_that_is_not_mlflow_or_refuses_us_is_told(
    tracker: MlflowTracker, tmp_path: Path, status: int, kind: type[CherryError], told: str
) -> None:
    class Other(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"hi")

        def log_message(self, *arguments: object) -> None:
            """No lines among those of the tests."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Other) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            with pytest.raises(kind) as caught:
                opened(f"http://127.0.0.1:{server.server_port}", tmp_path)
        finally:
            server.shutdown()
            thread.join()
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_a_deleted_experiment_is_told_with_the_way_to_restore_it(tracker: MlflowTracker, tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    client, experiment = opened(uri, tmp_path)._connection.get()
    client.delete_experiment(experiment)
    with pytest.raises(MissingFileError, match=f"'cherry' at {uri} is deleted.*--experiment-id {experiment}`, or name"):
        opened(uri, tmp_path)
    client.restore_experiment(experiment)
    opened(uri, tmp_path)


@pytest.mark.slow
def test_any_experiment_name_and_stray_variables_of_mlflow_do_no_harm(
    tracker: MlflowTracker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_RUN_ID", "0" * 32)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "other")
    made = opened(f"sqlite:///{tmp_path}/mlflow.db", tmp_path, experiment="it's/a:b 'x'")
    client, experiment = made._connection.get()
    run_id = made.runs.start("mine", parent=None, step="flow", identity="1", run_key="k")
    assert run_id is not None
    assert client.get_experiment(experiment).name == "it's/a:b 'x'"
    assert client.get_run(run_id).info.experiment_id == experiment


@pytest.mark.slow
def test_the_printed_page_opens_with_the_columns_that_decide(tracker: MlflowTracker) -> None:
    client, experiment = tracker._connection.get()
    view = json.loads(client.get_experiment(experiment).tags["mlflow.sharedViewState.cherry"])
    assert f"metrics.`{HEADLINE}`" in view["selectedColumns"] and "tags.`verdict`" in view["selectedColumns"]
    assert [group["name"] for group in view["compareRunSections"]] == list(GROUPS)
    assert f"/#/experiments/{experiment}/runs?viewStateShareKey=cherry" in tracker.page()
