"""What a finished training run leaves on disk and in MLflow, and what is found again."""

import json
import math
import shutil

import pytest

from cherry.train_record import SERIES
from tasks.records.figures import FIGURES

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
    assert finished["run_id"] == tree(project, "first")[0].info.run_id
    opened = json.loads((project.runs / "first" / "flow_run.json").read_text())
    assert opened == {"run_id": finished["run_id"]}


def test_every_step_is_a_finished_mlflow_run_under_the_flow(project, finished):
    parent, children = tree(project, "first")
    assert set(children) == set(STEPS)
    assert {run.info.status for run in [parent, *children.values()]} == {"FINISHED"}
    assert parent.data.params["train.learning_rate"] == "0.005"
    assert children["train"].data.params["model.hidden_size"] == "32"
    assert parent.data.tags["verdict"] == "better"
    assert "better" in parent.data.tags["mlflow.note.content"]
    for key in ("heldout_bits_per_byte", "tokens_per_second", "quantized_dnll"):
        assert parent.data.metrics[FIGURES[key]] == finished[key]
    assert parent.data.metrics["train/loss"] == finished["loss_last"]
    assert {f"seconds/{step}" for step in STEPS} <= set(parent.data.metrics)
    groups = {key.partition("/")[0] for key in parent.data.metrics}
    assert groups == {"quality", "train", "throughput", "plan", "seconds"}, "a figure outside of the page's groups"
    assert parent.data.tags["documents"] == str(finished["documents"])
    for run in (parent, *children.values()):
        assert run.data.tags["device"].startswith("CPU (")
        assert run.data.tags["python"] and "torch" in run.data.tags["packages"]
        assert len(run.data.tags["mlflow.source.git.commit"]) == 40


def test_mlflow_has_the_loss_of_every_training_step_once_and_the_rest_of_the_first_and_the_last(project, finished):
    run = tree(project, "first")[1]["train"]
    written = project.metrics("first")
    assert [line["step"] for line in written] == list(range(1, 61))
    for key in ("loss", "learning_rate", "grad_norm", "tokens_per_second", "expert_load_max_over_mean"):
        history = project.mlflow.get_metric_history(run.info.run_id, SERIES[key])
        sent = [(point.step, point.value) for point in history]
        lines = [(line["step"], line[key]) for line in written]
        assert sent == (lines if key == "loss" else [line for line in lines if line in sent])
        assert (sent[0], sent[-1]) == (lines[0], lines[-1])
        # One in each second, the evaluated ones and the last.
        assert key == "loss" or len(sent) <= written[-1]["time"] - written[0]["time"] + 5
    heldout = project.mlflow.get_metric_history(run.info.run_id, SERIES["heldout_loss"])
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
    # A search leaves the models out that a run took. A later run that finds this evaluation adds its own version.
    took = [model.model_id for model in project.mlflow.get_run(children["evaluate"].info.run_id).inputs.model_inputs]
    ((made,),) = {tuple(one.model_id for one in run.outputs.model_outputs) for run in (parent, children["register"])}
    assert made in took
    assert version.source == f"models:/{made}"
    folder = project.runs / "mlartifacts"
    assert not list(folder.rglob("*.safetensors"))


def test_plots_and_tables_are_artifacts(project, finished):
    def names(run, folder):
        return {one.path for one in project.mlflow.list_artifacts(run.info.run_id, folder)}

    parent, children = tree(project, "first")
    training = {"plots/loss.png", "plots/learning_rate.png", "plots/expert_load.png"}
    assert names(children["train"], "plots") == training
    others = {f"plots/{name}.png" for name in ("quantization", "quantization_map", "comparison", "plan_memory")}
    assert names(parent, "plots") == training | others
    assert names(parent, None) == {"plots", "summary.json", "config.yaml", "plan.json"}
    made = {"quantization.json", "quantization.png", "quantization_map.png", "quantization_by_kind.csv"}
    assert names(children["quantize"], None) == made
    assert "evaluation.json" in names(children["evaluate"], None)
    told = (project.runs / "first" / "events.jsonl").read_text()
    compared = int(children["evaluate"].data.tags["heldout_documents"])
    assert f"compared on {compared} documents, evaluate.documents asks for 200" in told
    for path in (project.runs / "mlartifacts").rglob("*.png"):
        assert path.read_bytes().startswith(b"\x89PNG")


def test_what_was_measured_stands_beside_the_plan(project, finished):
    parent, children = tree(project, "first")
    plan = json.loads((project.runs / "first" / "plan.json").read_text())
    for run in (parent, children["train"]):
        for name in ("step_seconds", "tokens_per_second", "peak_memory_gib"):
            assert run.data.metrics[f"plan/measured_over_plan_{name}"] > 0
    measured = children["train"].data.metrics
    assert measured["plan/step_seconds"] == pytest.approx(plan["predicted_step_seconds"])
    ratio = measured["throughput/peak_memory_gib"] / plan["predicted_peak_memory_gib"]
    assert measured["plan/measured_over_plan_peak_memory_gib"] == pytest.approx(ratio)


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
        step: record["run_id"] for step, record in before.items()
    }
    assert parent.info.run_id == finished["run_id"]
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
    parent, children = tree(project, "changed")
    assert set(children) == set(STEPS), "the steps that were found are under the new flow's run too"
    first = project.mlflow_runs("first")
    for step in STEPS[:5]:
        assert children[step].data.tags["cherry.reused_from"] == first[step].info.run_id
    for run in (parent, children["data"]):
        (dataset,) = [one.dataset for one in run.inputs.dataset_inputs]
        assert finished["data_digest"].startswith(dataset.digest)
    plots = {one.path for one in project.mlflow.list_artifacts(parent.info.run_id, "plots")}
    assert {"plots/loss.png", "plots/comparison.png", "plots/plan_memory.png"} <= plots


def test_another_format_is_judged_beside_the_run_s_own(project, finished):
    shutil.copytree(project.runs / "first", project.runs / "formats")
    (project.runs / "formats" / "run_key").unlink()
    ended = project.cherry("run", "name=formats", "quantize.compare=[w4a16]")
    assert ended.returncode == 0, ended.stderr
    summary = json.loads((project.runs / "formats" / "summary.json").read_text())
    own, other = summary["formats"]
    assert (own["format"], own["passed"]) == ("int8", True)
    assert own["dnll"] == pytest.approx(finished["quantized_dnll"])
    assert other["format"] == "w4a16"
    assert other["bytes_ratio"] < own["bytes_ratio"]
    assert other["kl"] > own["kl"] > 0
    assert "int8: " in ended.stdout and "w4a16: " in ended.stdout
    parent, children = tree(project, "formats")
    for run in (parent, children["evaluate"]):
        assert "plots/formats.png" in {one.path for one in project.mlflow.list_artifacts(run.info.run_id, "plots")}
    (version,) = project.versions("formats")
    assert version.tags["quantized_uri"].startswith(str(project.runs / "formats" / "quantized"))
