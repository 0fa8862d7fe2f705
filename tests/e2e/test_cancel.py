"""Runs that are cancelled, or whose flow is killed outright: nothing stays behind, and nothing is lost."""

import os
import pty
import re
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow
WHERE = r"at step \d+ of 1000000; checkpoint \d+"
ENDLESS = {"train": {"steps": 1_000_000}, "checkpoint": {"every_steps": 5}}


def training(project, name):
    """Until a checkpoint is committed; the run's processes are then the flow's launcher and its ranks."""
    checkpoints = project.runs / name / "train" / "checkpoints"
    project.wait_for(lambda: list(checkpoints.glob("step_*/COMMITTED")), "a committed checkpoint")
    lines = project.processes(name)
    assert sum("cherry.launcher" in line for line in lines) == 1
    assert len(lines) == 3


def said(project, flow_run_id):
    """Name and message of the states of a flow run and of its train task."""
    tasks = project.api("task_runs/filter", {"flow_runs": {"id": {"any_": [flow_run_id]}}})
    (task,) = [one for one in tasks if one["name"] == "train"]
    return [(one["state"]["name"], one["state"]["message"]) for one in (project.api(f"flow_runs/{flow_run_id}"), task)]


def test_cancelling_leaves_no_process_behind(project, worker):
    run = project.run_deployment("train-flow/train-tiny", overrides={"name": "cancelled", **ENDLESS})
    training(project, "cancelled")
    ended = project.call("prefect", "flow-run", "cancel", run)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert project.end_of(run) == "CANCELLED"
    project.wait_for(lambda: not project.processes("cancelled"), "the end of every process")
    project.wait_for(lambda: not (project.runs / "cancelled" / "lease.json").exists(), "the lease")
    project.wait_for(lambda: "step" in said(project, run)[0][1], "the message of the flow run's state")
    for name, message in said(project, run):
        assert name == "Cancelled"
        assert re.fullmatch(f"cancelled {WHERE}", message)
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
    assert running.wait() == 128 + sent
    assert not project.processes(name)
    assert "resume:   the same command" in (project.home / f"{name}.log").read_text()
    assert not (project.runs / name / "lease.json").exists()
    assert not (project.runs / name / "program.json").exists()
    runs = project.mlflow_runs(name)
    seconds = {key for key in runs["flow"].data.metrics if key.startswith("seconds/")}
    assert seconds == {"seconds/provision", "seconds/data"}
    statuses = {step: run.info.status for step, run in runs.items()}
    assert statuses == {"flow": "KILLED", "provision": "FINISHED", "data": "FINISHED", "train": "KILLED"}
    assert "Traceback" not in (project.home / f"{name}.log").read_text()
    (run,) = project.api("flow_runs/filter", {"flow_runs": {"name": {"any_": [name]}}})
    cause = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}[sent]
    for state, message in said(project, run["id"]):
        assert state == "Interrupted"
        assert re.fullmatch(f"interrupted by {cause} {WHERE}", message)


# Takes its standard input as the terminal of its session, and becomes the command.
ON_A_TERMINAL = """
import fcntl, os, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""


def test_a_closed_terminal_leaves_nothing_running_and_the_run_resumes(project):
    overrides = ["name=closed", "train.steps=60", "checkpoint.every_steps=5"]
    overrides += ["register_model.model_name=closed"]  # the other tests count the versions of `pipeline`
    command = [sys.executable, "-m", "flows.cli", "run", project.config, *overrides]
    screen, terminal = pty.openpty()
    os.set_blocking(screen, False)
    pipes = {"stdin": terminal, "stdout": terminal, "stderr": terminal}
    with subprocess.Popen(
        [sys.executable, "-c", ON_A_TERMINAL, *command[1:]],
        env=project.environment, cwd=ROOT, start_new_session=True, **pipes,
    ) as running:  # fmt: skip
        os.close(terminal)

        def saved():
            with suppress(BlockingIOError):
                os.read(screen, 1 << 16)  # a screen that nobody reads stops its writers
            return list((project.runs / "closed" / "train" / "checkpoints").glob("step_*/COMMITTED"))

        project.wait_for(saved, "a committed checkpoint")
        os.close(screen)
        assert running.wait() == 128 + signal.SIGHUP
    assert not project.processes("closed")
    assert not (project.runs / "closed" / "lease.json").exists()
    (run,) = project.api("flow_runs/filter", {"flow_runs": {"name": {"any_": ["closed"]}}})
    assert re.fullmatch(r"interrupted by SIGHUP at step \d+ of 60; checkpoint \d+", run["state"]["message"])
    steps = len(project.metrics("closed"))
    resumed = project.cherry("run", *overrides)
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert steps < 60
    assert [one["step"] for one in project.metrics("closed")] == list(range(1, 61))
    assert "resumed from" in (project.runs / "closed" / "train" / "launcher.log").read_text()
