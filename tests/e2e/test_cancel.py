"""Runs that are cancelled, or whose flow is killed outright: nothing stays behind, and nothing is lost."""

import os
import signal

import pytest

pytestmark = pytest.mark.slow
ENDLESS = {"train": {"steps": 1_000_000}, "checkpoint": {"every_steps": 5}}


def training(project, name):
    """Until a checkpoint is committed; the run's processes are then the flow's launcher and its ranks."""
    checkpoints = project.runs / name / "train" / "checkpoints"
    project.wait_for(lambda: list(checkpoints.glob("step_*/COMMITTED")), "a committed checkpoint")
    lines = project.processes(name)
    assert sum("cherry.launcher" in line for line in lines) == 1
    assert len(lines) == 3


def test_cancelling_leaves_no_process_behind(project, worker):
    run = project.run_deployment("train-flow/train-tiny", overrides={"name": "cancelled", **ENDLESS})
    training(project, "cancelled")
    ended = project.call("prefect", "flow-run", "cancel", run)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert project.end_of(run) == "CANCELLED"
    project.wait_for(lambda: not project.processes("cancelled"), "the end of every process")
    project.wait_for(lambda: not (project.runs / "cancelled" / "lease.json").exists(), "the lease")
    statuses = {step: run.info.status for step, run in project.mlflow_runs("cancelled").items()}
    assert (statuses["flow"], statuses["data"], statuses["train"]) == ("KILLED", "FINISHED", "KILLED")
    assert not (project.runs / "cancelled" / "program.json").exists()


def test_a_flow_that_is_killed_outright_leaves_no_process_behind(project):
    overrides = ["name=crashed", "train.steps=1000000", "checkpoint.every_steps=5"]
    running = project.start("flows.cli", "run", project.config, *overrides, log="crashed")
    training(project, "crashed")
    os.kill(running.pid, signal.SIGKILL)
    running.wait()
    project.wait_for(lambda: not project.processes("crashed"), "the end of every process")
    refused = project.cherry("run", "name=crashed", "train.steps=many")
    assert refused.returncode == 11


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_a_command_that_is_stopped_leaves_nothing_running_or_held(project, sent):
    name = f"stopped-{sent.name.lower()}"
    overrides = [f"name={name}", "train.steps=1000000", "checkpoint.every_steps=5"]
    running = project.start("flows.cli", "run", project.config, *overrides, log=name)
    training(project, name)
    running.send_signal(sent)
    assert running.wait() != 0
    assert not project.processes(name)
    if sent == signal.SIGINT:
        assert "resume:   the same command" in (project.home / f"{name}.log").read_text()
    assert not (project.runs / name / "lease.json").exists()
    assert not (project.runs / name / "program.json").exists()
    runs = project.mlflow_runs(name)
    seconds = {key for key in runs["flow"].data.metrics if key.startswith("seconds_")}
    assert seconds == {"seconds_provision", "seconds_data"}
    statuses = {step: run.info.status for step, run in runs.items()}
    assert statuses == {"flow": "KILLED", "provision": "FINISHED", "data": "FINISHED", "train": "KILLED"}
    assert "Traceback" not in (project.home / f"{name}.log").read_text()
