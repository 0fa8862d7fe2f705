"""MLflow's own database: runs found again, values kept, versions by reference with the history of their aliases."""

import json
import threading
import warnings

import pytest

from base.errors import OperationalError
from tasks.run_config import TrackingConfig
from tasks.tracking.mlflow_tracker import MlflowTracker, tracking_uri

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def tracker(tmp_path_factory):
    made = MlflowTracker(TrackingConfig(), str(tmp_path_factory.mktemp("runs")))
    with warnings.catch_warnings():
        # MLflow's modules and tables use what others have deprecated, which shows when they are first used.
        warnings.simplefilter("ignore")
        assert made.start("warm", parent=None, step="flow", identity="0", run_key="k") is not None
    return made


def run(tracker, run_id):
    return tracker._client()[0].get_run(run_id)


def test_where_runs_are_recorded(monkeypatch, tmp_path):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert tracking_uri(TrackingConfig(), str(tmp_path)) == f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://tracking:5000")
    assert tracking_uri(TrackingConfig(), str(tmp_path)) == "http://tracking:5000"
    assert tracking_uri(TrackingConfig(uri="http://mine:1"), str(tmp_path)) == "http://mine:1"


def test_a_run_is_found_again_by_step_fingerprint_name_and_directory(tracker):
    what = {"parent": None, "step": "train", "identity": "f1", "run_key": "here"}
    first = tracker.start("mine-train", **what)
    tracker.finish(first, "FAILED")
    assert tracker.start("mine-train", **what) == first
    assert run(tracker, first).info.status == "RUNNING"
    for other in ({"identity": "f2"}, {"run_key": "there"}, {"step": "export"}):
        assert tracker.start("mine-train", **{**what, **other}) != first
    assert tracker.start("other-train", **what) != first


def test_a_parameter_keeps_its_first_value_and_the_rest_is_recorded(tracker):
    run_id = tracker.start("values", parent=None, step="data", identity="f", run_key="k")
    tracker.log(run_id, params={"a": 1, "long": "x" * 9000})
    tracker.log(run_id, params={"a": 2, "b": 3}, metrics={"m": 0.5}, tags={"t": "u"})
    data = run(tracker, run_id).data
    assert (data.params["a"], data.params["b"], data.metrics["m"], data.tags["t"]) == ("1", "3", 0.5, "u")
    assert len(data.params["long"]) == 6000
    tracker.log(None, metrics={"m": 1.0})


def test_more_points_than_a_request_takes(tracker):
    run_id = tracker.start("points", parent=None, step="train", identity="f", run_key="k")
    assert tracker.points(run_id, [("loss", step / 3, step, 1000 + step) for step in range(2500)])
    history = tracker._client()[0].get_metric_history(run_id, "loss")
    assert [(point.step, point.value) for point in history] == [(step, step / 3) for step in range(2500)]


def test_open_children_end_with_their_parent(tracker):
    parent = tracker.start("family", parent=None, step="flow", identity="f", run_key="k")
    children = [tracker.start("family-x", parent=parent, step=step, identity="f", run_key="k") for step in ("a", "b")]
    tracker.finish(children[0], "FINISHED")
    tracker.finish_family(parent, "KILLED")
    statuses = [run(tracker, one).info.status for one in (parent, *children)]
    assert statuses == ["KILLED", "FINISHED", "KILLED"]


def test_a_version_is_registered_once_by_reference_and_aliases_leave_a_trace(tracker, capfd):
    run_id = tracker.start("model", parent=None, step="register", identity="f", run_key="k")
    assert tracker.version("net", alias="candidate") is None
    first = tracker.register(
        run_id, "net", "/runs/a/export", identity="i1", alias="candidate", tags={"verdict": "better"}
    )
    again = tracker.register(
        run_id, "net", "/runs/a/export", identity="i1", alias="candidate", tags={"verdict": "worse"}
    )
    second = tracker.register(run_id, "net", "/runs/b/export", identity="i2", alias="candidate", tags={})
    assert (first.version, again.version, second.version) == (1, 1, 2)
    assert "models:/" not in first.model_id
    assert first.model_id == again.model_id != second.model_id
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""
    candidate = tracker.version("net", alias="candidate")
    assert (candidate.version, candidate.uri, candidate.tags["previous_candidate"]) == (2, "/runs/b/export", "1")
    assert tracker.version("net", number=1).tags["verdict"] == "worse"
    assert tracker.version("net", number=7) is None
    assert tracker.version("net", alias="champion") is None


def test_models_are_a_runs_inputs_and_outputs_once_however_often_they_are_told(tracker):
    made = tracker.start("made", parent=None, step="register", identity="f", run_key="k")
    model = tracker.register(made, "linked", "/runs/a/export", identity="i", alias="candidate", tags={}).model_id
    used = tracker.start("used", parent=None, step="evaluate", identity="f", run_key="k")
    for _ in range(2):
        tracker.models(made, outputs=[model])
        tracker.models(used, inputs=[model])
    assert [one.model_id for one in run(tracker, made).outputs.model_outputs] == [model]
    assert [one.model_id for one in run(tracker, used).inputs.model_inputs] == [model]
    shown = tracker._client()[0].get_logged_model(model).tags["mlflow.modelVersions"]
    assert [(one["name"], int(one["version"])) for one in json.loads(shown)] == [("linked", 1)]


def test_connecting_early_leaves_what_the_first_call_needs_and_keeps_an_outage_to_itself(tmp_path):
    trackers = [MlflowTracker(TrackingConfig(uri=uri), str(tmp_path)) for uri in (None, "http://127.0.0.1:9")]
    for tracker in trackers:
        tracker.connect_early()
    for thread in threading.enumerate():
        if thread.name == "mlflow":
            thread.join()
    connected = trackers[0]._connected
    assert connected is not None and trackers[0]._client() is connected
    assert trackers[1]._connected is None


def test_an_outage_is_a_warning_for_figures_and_an_error_for_the_registry(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    down = MlflowTracker(TrackingConfig(uri="http://127.0.0.1:9"), str(tmp_path))
    assert down.start("x", parent=None, step="data", identity="f", run_key="k") is None
    assert not down.points("run", [("loss", 1.0, 1, 1)])
    down.finish("run", "FINISHED")
    assert "tracking: start failed" in caplog.text
    for ask in (lambda: down.version("net", alias="champion"), lambda: down.set_alias("net", "champion", 1)):
        with pytest.raises(OperationalError, match="registry"):
            ask()
