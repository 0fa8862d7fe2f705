"""What a finished training run leaves on disk and in MLflow, and what is found again."""

import json
import math
import shutil

import pytest

pytestmark = pytest.mark.slow
STEPS = ("provision", "data", "train", "export", "quantize", "evaluate", "register")


def tree(project, name):
    """The flow's MLflow run, and its children by step."""
    runs = project.mlflow_runs(name)
    parent = runs.pop("flow")
    assert {run.data.tags["mlflow.parentRunId"] for run in runs.values()} == {parent.info.run_id}
    return parent, {step: run for step, run in runs.items() if step != "deploy"}


def test_the_summary_says_what_came_out(project, finished):
    assert finished["loss_last"] < finished["loss_first"]
    assert finished["heldout_bits_per_byte"] < finished["zlib_bits_per_byte"]
    assert 0 < finished["quantized_bytes_ratio"] < 1
    assert abs(finished["quantized_dnll"]) < 0.02
    assert (finished["verdict"], finished["compared_with"]) == ("better", "untrained")
    assert set(finished["seconds"]) == set(STEPS)
    assert finished["mlflow_run_id"] == tree(project, "first")[0].info.run_id
    opened = json.loads((project.runs / "first" / "flow_run.json").read_text())
    assert opened == {"mlflow_run_id": finished["mlflow_run_id"]}


def test_every_step_is_a_finished_mlflow_run_under_the_flow(project, finished):
    parent, children = tree(project, "first")
    assert set(children) == set(STEPS)
    assert {run.info.status for run in [parent, *children.values()]} == {"FINISHED"}
    assert parent.data.params["train.learning_rate"] == "0.005"
    assert children["train"].data.params["model.hidden_size"] == "32"
    assert parent.data.tags["verdict"] == "better"
    assert "better" in parent.data.tags["mlflow.note.content"]
    for key in ("heldout_bits_per_byte", "tokens_per_second", "quantized_dnll", "loss_last"):
        assert parent.data.metrics[key] == finished[key]
    assert {f"seconds_{step}" for step in STEPS} <= set(parent.data.metrics)


def test_mlflow_has_the_loss_of_every_training_step_once_and_the_rest_of_the_first_and_the_last(project, finished):
    run = tree(project, "first")[1]["train"]
    written = project.metrics("first")
    assert [line["step"] for line in written] == list(range(1, 61))
    for key in ("loss", "learning_rate", "grad_norm", "tokens_per_second", "expert_load_max_over_mean"):
        sent = [(point.step, point.value) for point in project.mlflow.get_metric_history(run.info.run_id, key)]
        lines = [(line["step"], line[key]) for line in written]
        assert sent == (lines if key == "loss" else [line for line in lines if line in sent])
        assert (sent[0], sent[-1]) == (lines[0], lines[-1])
        # One in each second, the evaluated ones and the last.
        assert key == "loss" or len(sent) <= written[-1]["time"] - written[0]["time"] + 5
    heldout = project.mlflow.get_metric_history(run.info.run_id, "heldout_window_loss")
    assert [point.step for point in heldout] == [20, 40, 60]
    assert any(key.startswith("system/cpu") for key in run.data.metrics)


def test_dataset_and_model_are_recorded_by_reference(project, finished):
    parent, children = tree(project, "first")
    for run in (parent, children["data"]):
        (dataset,) = [one.dataset for one in run.inputs.dataset_inputs]
        assert finished["data_digest"].startswith(dataset.digest)
        assert json.loads(dataset.source)["uri"] == str(project.home / "corpus")
    (version,) = project.versions("first")
    assert version.tags["uri"].startswith(str(project.runs / "first" / "export"))
    assert version.tags["parent_run_id"] == parent.info.run_id
    assert float(version.tags["heldout_bits_per_byte"]) == pytest.approx(finished["heldout_bits_per_byte"], abs=1e-4)
    (heldout,) = children["evaluate"].inputs.dataset_inputs
    assert {tag.key: tag.value for tag in heldout.tags} == {"mlflow.data.context": "evaluation"}
    assert json.loads(heldout.dataset.profile)["documents"] > 0
    # A search leaves the models out that a run took.
    (model,) = project.mlflow.get_run(children["evaluate"].info.run_id).inputs.model_inputs
    for run in (parent, children["register"]):
        assert [one.model_id for one in run.outputs.model_outputs] == [model.model_id]
    assert version.source == f"models:/{model.model_id}"
    folder = project.runs / "mlartifacts"
    assert not list(folder.rglob("*.safetensors"))


def test_plots_and_tables_are_artifacts(project, finished):
    def names(run, folder):
        return {one.path for one in project.mlflow.list_artifacts(run.info.run_id, folder)}

    parent, children = tree(project, "first")
    training = {"plots/loss.png", "plots/learning_rate.png", "plots/expert_load.png"}
    assert names(children["train"], "plots") == training
    others = {"plots/quantization.png", "plots/comparison.png", "plots/plan_memory.png"}
    assert names(parent, "plots") == training | others
    assert names(parent, None) == {"plots", "summary.json", "config.yaml", "plan.json"}
    assert names(children["quantize"], None) == {"quantization.json", "quantization.png"}
    assert "evaluation.json" in names(children["evaluate"], None)
    told = (project.runs / "first" / "events.jsonl").read_text()
    compared = int(children["evaluate"].data.metrics["heldout_documents"])
    assert f"compared on {compared} documents, evaluate.documents asks for 200" in told
    for path in (project.runs / "mlartifacts").rglob("*.png"):
        assert path.read_bytes().startswith(b"\x89PNG")


def test_what_was_measured_stands_beside_the_plan(project, finished):
    parent, children = tree(project, "first")
    plan = json.loads((project.runs / "first" / "plan.json").read_text())
    for run in (parent, children["train"]):
        metrics = run.data.metrics
        assert metrics["predicted_step_seconds"] == pytest.approx(plan["predicted_step_seconds"])
        for name in ("step_seconds", "tokens_per_second", "peak_memory_gib"):
            assert metrics[f"{name}_over_plan"] > 0
    measured = children["train"].data.metrics
    ratio = measured["peak_memory_gib"] / plan["predicted_peak_memory_gib"]
    assert measured["peak_memory_gib_over_plan"] == pytest.approx(ratio)


def test_quantization_tells_the_error_of_each_tensor(project, finished):
    report = json.loads((project.runs / "first" / "quantized" / "quantization.json").read_text())
    assert len(report["tensors"]) > 20
    assert all(0 < one["rel_error"] < 0.02 and math.isfinite(one["max_abs_error"]) for one in report["tensors"])
    kept = ("gate", "norm", "embed_tokens", "lm_head")
    assert not [one["name"] for one in report["tensors"] if any(f"{part}.weight" in one["name"] for part in kept)]


def test_the_same_command_finds_every_step_finished(project, finished):
    before = {step: project.step("first", step) for step in STEPS}
    ended = project.cherry("run", "--verbose")
    assert ended.returncode == 0, ended.stderr
    for step in STEPS:
        assert f"found finished: {step}" in ended.stdout + ended.stderr
        assert project.step("first", step) == before[step]
    parent, children = tree(project, "first")
    assert {step: run.info.run_id for step, run in children.items()} == {
        step: record["mlflow_run_id"] for step, record in before.items()
    }
    assert parent.info.run_id == finished["mlflow_run_id"]
    assert len(project.versions("first")) == 1


def test_a_changed_key_redoes_what_depends_on_it_and_nothing_else(project, finished):
    # A copy, so that the shared run stays as it is.
    shutil.copytree(project.runs / "first", project.runs / "changed")
    (project.runs / "changed" / "run_key").unlink()
    ended = project.cherry("run", "name=changed", "evaluate.confidence=0.9", "--verbose")
    assert ended.returncode == 0, ended.stderr
    before = len((project.runs / "first" / "events.jsonl").read_text().splitlines())
    lines = (project.runs / "changed" / "events.jsonl").read_text().splitlines()[before:]
    events = [(one["event"], one["step"]) for one in map(json.loads, lines)]
    assert [step for event, step in events if event == "reused"] == list(STEPS[:5])
    assert [step for event, step in events if event == "started"] == ["evaluate", "register"]
