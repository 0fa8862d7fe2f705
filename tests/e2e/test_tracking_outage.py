"""An MLflow server that dies while a run trains: the run does not notice, and MLflow is told all of it later."""

import pytest

from tasks.records.figures import HEADLINE

pytestmark = pytest.mark.slow


def test_training_goes_on_and_nothing_is_lost(project, second):
    assert second["at_the_outage"] < 60
    written = project.metrics("second")
    assert [line["step"] for line in written] == list(range(1, 61))
    assert second["loss_last"] == written[-1]["loss"]


def test_the_terminal_says_at_once_that_tracking_is_lost_and_again_at_the_end(project, second):
    lines = (project.home / "second.log").read_text().splitlines()
    (at,) = [index for index, line in enumerate(lines) if "tracking is lost: no server answers at http://" in line]
    assert at < next(index for index, line in enumerate(lines) if line.startswith("train: finished"))
    (page,) = [line for line in lines if line.strip().startswith("figures:")]
    assert "incomplete" in page and "calls were lost" in page


def test_mlflow_is_caught_up_when_it_is_back(project, second):
    runs = project.mlflow_runs("second")
    assert set(runs) >= {"flow", "provision", "data", "train", "export", "quantize", "evaluate", "register"}
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    history = project.mlflow.get_metric_history(runs["train"].info.run_id, "train/loss")
    written = project.metrics("second")
    assert [(point.step, point.value) for point in history] == [(line["step"], line["loss"]) for line in written]
    for key in (HEADLINE, "train/loss", "throughput/tokens_per_second_mean", "seconds/train"):
        assert key in runs["flow"].data.metrics


def test_two_runs_compared_in_mlflow_tell_which_is_better_and_why(project, finished, second):
    better, worse = (project.mlflow_runs(name)["flow"] for name in ("first", "second"))
    assert second["verdict"] == worse.data.tags["verdict"] == "worse"
    assert worse.data.tags["baseline"] == "pipeline v1"
    assert worse.data.tags["reason"] == second["reason"]
    for key in (HEADLINE, "quality/heldout_loss", "train/loss"):
        assert better.data.metrics[key] < worse.data.metrics[key]
    differing = {key for key, value in better.data.params.items() if worse.data.params[key] != value}
    assert differing == {"name", "train.learning_rate", "tracking.uri"}
    judged = project.mlflow_runs("second")["evaluate"].data.metrics
    assert judged["vs_pipeline v1/low"] > 0
    assert not [key for key in worse.data.metrics if key.startswith("vs_")], (
        "the baselines differ: no bars of one chart"
    )
    for run in (better, worse):
        history = project.mlflow.get_metric_history(run.info.run_id, "train/loss")
        assert [point.step for point in history] == list(range(1, 61))


def test_a_worse_candidate_does_not_become_champion(project, finished, second):
    (first,), (version,) = project.versions("first"), project.versions("second")
    champion = project.mlflow.get_model_version_by_alias("pipeline", "champion")
    # These weights may be registered again meanwhile, by a retraining that finds them.
    assert champion.tags["export_fingerprint"] == first.tags["export_fingerprint"]
    assert champion.tags["export_fingerprint"] != version.tags["export_fingerprint"]
    assert version.tags["verdict"] == "worse"
    assert version.tags["compared_with"] == f"pipeline v{first.version}"
