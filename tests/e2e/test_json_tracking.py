"""A whole training flow tracked in JSON files: the same steps, series, versions and aliases, and no MLflow."""

import json

import pytest

pytestmark = pytest.mark.slow
STEPS = ("provision", "data", "train", "export", "quantize", "evaluate", "register")


@pytest.fixture(scope="module")
def tracked(project):
    """The folder of the tracker after a run."""
    folder = project.home / "tracked"
    ended = project.cherry("run", "name=json", f"tracking.uri=json:{folder}", "register_model.model_name=in-json")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return folder


def test_each_step_is_a_finished_run_under_the_flow(project, tracked):
    runs = {path.stem: json.loads(path.read_text()) for path in (tracked / "runs").glob("*.json")}
    by_step = {run["step"]: key for key, run in runs.items()}
    assert set(by_step) == {"flow", *STEPS}
    assert {run["status"] for run in runs.values()} == {"FINISHED"}
    assert {runs[by_step[step]]["parent"] for step in STEPS} == {by_step["flow"]}
    flow = runs[by_step["flow"]]
    assert flow["params"]["name"] == "json"
    assert "better" in flow["note"]
    assert {f"seconds/{step}" for step in STEPS} <= set(flow["metrics"])
    assert all(project.step("json", step)["run_id"] == by_step[step] for step in STEPS)
    assert all(run["code"]["digest"] == flow["code"]["digest"] for run in runs.values())
    made = runs[by_step["register"]]["outputs"]
    assert made == runs[by_step["flow"]]["outputs"] == [{"model": "in-json", "version": 1}]
    assert made[0] in runs[by_step["evaluate"]]["inputs"]


def test_the_loss_of_every_training_step_is_a_point_once(project, tracked):
    run_id = project.step("json", "train")["run_id"]
    points = [json.loads(line) for line in (tracked / "runs" / f"{run_id}.jsonl").read_text().splitlines()]
    sent = [(point["step"], point["value"]) for point in points if point["name"] == "train/loss"]
    assert sent == [(line["step"], line["loss"]) for line in project.metrics("json")]
    assert [point["step"] for point in points if point["name"] == "train/heldout_window_loss"] == [20, 40, 60]
    assert (tracked / "runs" / run_id / "plots" / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_the_version_is_registered_with_its_aliases(project, tracked):
    model = json.loads((tracked / "models" / "in-json.json").read_text())
    assert model["aliases"] == {"candidate": 1, "champion": 1}
    (version,) = model["versions"]
    assert version["uri"] == str(project.runs / "json" / "export")
    assert version["tags"]["verdict"] == "better"


def test_the_same_command_finds_every_step_and_registers_nothing_new(project, tracked):
    before = {step: project.step("json", step) for step in STEPS}
    overrides = ("name=json", f"tracking.uri=json:{tracked}", "register_model.model_name=in-json")
    ended = project.cherry("run", *overrides)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert {step: project.step("json", step) for step in STEPS} == before
    assert len(json.loads((tracked / "models" / "in-json.json").read_text())["versions"]) == 1
