"""A run that is far slower than its plan: a warning on the terminal, in the run's events and in Prefect's log, once."""

import json

import pytest

pytestmark = pytest.mark.slow


def test_a_run_far_slower_than_its_plan_is_warned_of_once(project):
    cluster = project.home / "gpu.yaml"
    cluster.write_text("kind: local\ngpu: H100\n")  # a plan for a device that this machine is much slower than
    ended = project.cherry("run", "name=slow", f"cluster={cluster}", "register_model.model_name=slow")
    assert ended.returncode == 0, ended.stdout + ended.stderr

    planned = json.loads((project.runs / "slow" / "plan.json").read_text())["predicted_step_seconds"]
    (line,) = [line for line in ended.stdout.splitlines() if "times the plan's" in line]
    assert line.startswith("train: warning: a step takes ")
    assert f"the plan's {planned:.3g} s. Likely causes: other programs on the CPU" in line
    events = (project.runs / "slow" / "events.jsonl").read_text().splitlines()
    (event,) = [one for one in map(json.loads, events) if "times the plan's" in str(one.get("line"))]
    assert (event["step"], event["lasting"]) == ("train", True)
    (run,) = project.api("flow_runs/filter", {"flow_runs": {"name": {"any_": ["slow"]}}})
    logged = project.api("logs/filter", {"logs": {"flow_run_id": {"any_": [run["id"]]}, "level": {"ge_": 30}}})
    assert len([one for one in logged if "times the plan's" in one["message"]]) == 1
