"""prefect.yaml on a real server with a process worker."""

from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow


def test_every_deployment_is_there_with_one_run_at_a_time(project):
    found = {one["name"]: one for one in project.api("deployments/filter", {})}
    written = {one["name"] for one in yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"]}
    assert set(found) == written == {"train-tiny", "train-671b", "deploy", "retrain-weekly", "reap-clusters"}
    for one in found.values():
        assert one["global_concurrency_limit"]["limit"] == 1
        assert one["concurrency_options"]["collision_strategy"] == "ENQUEUE"
        assert one["work_pool_name"] == "cherry"
    schedules = {
        name: [(one["schedule"]["cron"], one["schedule"]["timezone"]) for one in deployment["schedules"]]
        for name, deployment in found.items()
        if deployment["schedules"]
    }
    assert schedules == {"retrain-weekly": [("0 3 * * 1", "UTC")], "reap-clusters": [("*/15 * * * *", "UTC")]}


def test_the_schedule_makes_runs(project):
    def scheduled():
        asked = {
            "flows": {"name": {"any_": ["retrain-flow"]}},
            "flow_runs": {"state": {"type": {"any_": ["SCHEDULED"]}}},
        }
        return project.api("flow_runs/filter", asked)

    runs = project.wait_for(scheduled, "runs of the weekly retraining")
    assert all(run["auto_scheduled"] for run in runs)
    # As `cherry setup` left them.
    assert sorted(run["name"] for run in runs) == sorted(
        f"retrain tiny-{run['expected_start_time'][:10].replace('-', '')}" for run in runs
    )


@pytest.mark.parametrize(
    ("parameters", "named"),
    [
        ({"overrides": {"train": {"learning_rte": 0.1}}}, "learning_rte"),
        ({"overrides": {"trian": {}}}, "trian"),
        ({"overrides": {"train": {"steps": "many"}}}, "overrides.train.steps"),
        ({"overides": {}}, "overides"),
    ],
)
def test_a_wrong_parameter_is_refused_before_a_run_exists(project, parameters, named):
    runs_of_it = {"flows": {"name": {"any_": ["train-flow"]}}}
    before = project.api("flow_runs/count", runs_of_it)
    ended = project.deployment_run("train-flow/train-tiny", **parameters)
    assert ended.returncode != 0
    assert named in ended.stdout + ended.stderr
    assert project.api("flow_runs/count", runs_of_it) == before


def test_a_deployment_runs_to_the_end(project, finished):
    run = project.api(f"flow_runs/{finished['flow_run_id']}")
    assert (run["state_type"], run["name"]) == ("COMPLETED", "mini")
    tasks = project.api(
        "task_runs/filter", {"flow_runs": {"id": {"any_": [run["id"]]}}, "sort": "EXPECTED_START_TIME_ASC"}
    )
    assert [task["name"] for task in tasks] == [
        "provision", "data", "train", "export", "quantize", "evaluate", "register",
    ]  # fmt: skip
    artifacts = project.api("artifacts/filter", {"artifacts": {"flow_run_id": {"any_": [run["id"]]}}})
    keys = {"plan-first", "train-first", "quantization-first", "evaluate-first", "run-first", "links-first"}
    assert {one["key"] for one in artifacts} == keys
