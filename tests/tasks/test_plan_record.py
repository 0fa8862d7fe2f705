"""What a run does with its plan: refuse, go on when told to, show it, and stand beside what was measured."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from base import storage
from base.errors import ConfigError, DoesNotFitError
from cherry.cluster import ClusterSpec
from cherry.hardware import GPUS
from cherry.planner import local_device
from cherry.planner.plan import make_plan
from tasks import plan_record as plans
from tasks.overrides import resolve
from tasks.plan_record import compared, planned_step_seconds, predict, record_plan, refuse
from tasks.steps import RunContext, StepRun

ROOT = Path(__file__).resolve().parents[2]
NODES = ClusterSpec(kind="nodes", gpu="H100", nodes=32, gpus_per_node=8)


class Tracker:
    """Keeps what it is told."""

    def __init__(self):
        self.logged, self.files = {}, []

    def log(self, run_id, *, params=None, metrics=None, tags=None):
        self.logged.setdefault(run_id, {}).update(metrics or {})

    def artifact(self, run_id, path, folder=""):
        self.files.append((run_id, folder, Path(path).name))


def large(**changes):
    return resolve(str(ROOT / "configs" / "671b.yaml"), changes)


def test_no_host_is_taken_for_a_job_without_room_unless_told_otherwise(caplog):
    config = large(parallel={"expert": 1})
    plan = predict(config, NODES)
    with pytest.raises(DoesNotFitError, match=r"parallel\.expert=64\n(.|\n)*plan\.refuse=false"):
        refuse(plan, config)
    refuse(plan, large(parallel={"expert": 1}, plan={"refuse": False}))
    assert "plan.refuse is false" in caplog.text
    refuse(predict(large(), NODES), large())


def test_the_plan_is_written_drawn_and_logged(tmp_path, monkeypatch):
    config, tracker, said = large(), Tracker(), []
    context = RunContext(str(tmp_path), config, parent_run_id="parent")
    step = StepRun(context, "provision", "f", "own", tracker)
    monkeypatch.setattr(StepRun, "say", lambda self, line, fraction=None: said.append(line))
    monkeypatch.setattr(plans, "show_table", lambda key, rows, description: said.append((key, rows)))
    made = make_plan(config, NODES)
    outputs = record_plan(made, context, step)
    assert json.loads(Path(outputs["plan"]).read_text())["fits"]
    predicted = {f"plan/{key.removeprefix('predicted_')}": value for key, value in made.predictions().items()}
    assert tracker.logged == {"own": predicted}, "a comparison of flows opens on the first figure: the loss"
    for run_id in ("own", "parent"):
        assert {(run_id, "", "plan.json"), (run_id, "plots", "plan_memory.png")} <= set(tracker.files)
    assert (tmp_path / "plots" / "plan_memory.png").read_bytes().startswith(b"\x89PNG")
    key, rows = said[-1]
    assert key == "plan-finetune-671b"
    assert {"what": "tokens/s/GPU"}.items() <= next(row for row in rows if row["section"] == "speed").items()


def test_what_was_measured_stands_beside_what_was_planned(tmp_path):
    assert compared(tmp_path, {"tokens_per_second": 1.0}) == {}
    made = make_plan(large(), NODES)
    (tmp_path / "plan.json").write_text(json.dumps(made.as_dict()))
    measured = {
        "step_seconds_mean": 2 * made.step.total,
        "tokens_per_second": made.step.tokens_per_s / 2,
        "peak_memory_gib": made.worst.allocated / 2**30,
    }
    found = compared(tmp_path, measured)
    assert found["step_seconds_over_plan"] == pytest.approx(2.0)
    assert found["tokens_per_second_over_plan"] == pytest.approx(0.5)
    assert found["peak_memory_gib_over_plan"] == pytest.approx(1.0)
    assert found["predicted_step_seconds"] == made.step.total


@pytest.mark.parametrize(
    ("model", "device"), [("NVIDIA H200", "H200"), ("NVIDIA H100 80GB HBM3", "H100"), ("Tesla T4", None)]
)
def test_this_machines_gpu_is_known_by_its_drivers_name(tmp_path, monkeypatch, model, device):
    folder = tmp_path / "0000:01:00.0"
    folder.mkdir()
    (folder / "information").write_text(f"Model: \t\t {model}\nIRQ:   \t\t 1\n")
    monkeypatch.setattr(local_device, "_GPU_ROOT", tmp_path)
    tiny = resolve(str(ROOT / "configs" / "tiny.yaml"), {})
    if device is not None:
        assert predict(tiny, ClusterSpec(kind="local")).work.gpu == GPUS[device]
        return
    with pytest.raises(ConfigError, match="this machine's Tesla T4: known are H100, H100 PCIe"):
        local_device.local_device()
    assert predict(tiny, ClusterSpec(kind="local")) is None  # such a machine trains all the same


def test_a_machine_without_gpus_is_planned_with_its_own_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(local_device, "_GPU_ROOT", tmp_path / "none")
    device = local_device.local_device()
    assert device == replace(GPUS["laptop"], name="this CPU", memory_bytes=device.memory_bytes)
    in_bf16 = large(launch={"nnodes": 1, "nproc_per_node": 1}, parallel={"expert": 1})
    assert predict(in_bf16, ClusterSpec(kind="local")) is None


def test_the_planned_time_of_a_step_is_read_from_the_plan(tmp_path):
    assert planned_step_seconds(tmp_path) is None
    storage.write_json(str(tmp_path / "plan.json"), make_plan(large(), NODES).as_dict())
    assert planned_step_seconds(tmp_path) == make_plan(large(), NODES).step.total
