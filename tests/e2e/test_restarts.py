"""Runs whose worker or process is killed outright: training goes on, or starts again by itself, a few times."""

import os
import re
import signal

import pytest

pytestmark = pytest.mark.slow
# A model of their own: other tests count the versions of the project's.
STEPS = 120
LONG = {"train": {"steps": STEPS}, "checkpoint": {"every_steps": 5}, "register_model": {"model_name": "restarts"}}


@pytest.fixture
def own_worker(project):
    """Starts a worker that the test may kill; those that are left end with the test."""
    started = []

    def start():
        started.append(project.start("prefect", "worker", "start", "--pool", "cherry", log="own-worker"))
        return started[-1]

    yield start
    for one in started:
        if one.poll() is None:
            one.terminate()
        one.wait()


def checkpoints(project, name):
    return list((project.runs / name / "train" / "checkpoints").glob("step_*/COMMITTED"))


def history(project, run):
    return project.api(f"flow_run_states/?flow_run_id={run}")


def states(project, run):
    return [state["type"] for state in history(project, run)]


def interrupted_tasks(project, run):
    """Messages of the tasks of a flow run that were interrupted."""
    tasks = project.api("task_runs/filter", {"flow_runs": {"id": {"any_": [run]}}})
    return [one["state"]["message"] for one in tasks if one["state"]["name"] == "Interrupted"]


def events(project, run):
    """Names of the events of a flow run, without the heartbeats."""
    asked = {
        "filter": {"any_resource": {"id": [f"prefect.flow-run.{run}"]}, "event": {"prefix": ["prefect.flow-run."]}}
    }
    found = [one["event"].removeprefix("prefect.flow-run.") for one in project.api("events/filter", asked)["events"]]
    return [name for name in found if name != "heartbeat"]


def test_a_run_outlives_its_worker(project, own_worker):
    worker = own_worker()
    run = project.run_deployment("train-flow/train-tiny", overrides={"name": "outlives", **LONG})
    project.wait_for(lambda: project.metrics("outlives"), "training")
    os.kill(worker.pid, signal.SIGKILL)
    worker.wait()
    assert project.end_of(run) == "COMPLETED"
    assert "CRASHED" not in states(project, run)
    assert len(project.metrics("outlives")) == STEPS


def test_a_run_whose_process_is_killed_resumes_by_itself_and_completes(project, own_worker):
    own_worker()
    run = project.run_deployment("train-flow/train-tiny", overrides={"name": "again", **LONG})
    project.wait_for(lambda: checkpoints(project, "again"), "a committed checkpoint")
    project.flow_process("again").kill()
    # The flow run's own state says it too, unless the hook comes after the next start: then that one's state stays.
    (message,) = project.wait_for(lambda: interrupted_tasks(project, run), "the message of the task's state")
    assert re.match(
        rf"interrupted at step \d+ of {STEPS}; checkpoint \d+\. Process exited with status code: -9", message
    )
    project.wait_for(lambda: states(project, run).count("RUNNING") > 1, "the second start")
    assert project.end_of(run) == "COMPLETED"
    assert states(project, run).count("RUNNING") == 2
    assert [one["step"] for one in project.metrics("again")] == list(range(1, STEPS + 1))
    project.wait_for(lambda: "Completed" in events(project, run), "the events")
    assert [events(project, run).count(name) for name in ("Crashed", "AwaitingRetry")] == [1, 1]


@pytest.mark.long
def test_a_run_that_keeps_crashing_fails_after_its_attempts(project, own_worker):
    own_worker()
    overrides = {"name": "hopeless", **LONG, "train": {"steps": 1_000_000}, "retry": {"attempts": 2}}
    run = project.run_deployment("train-flow/train-tiny", overrides=overrides)
    for attempt in (1, 2):
        project.wait_for(lambda: checkpoints(project, "hopeless"), "a committed checkpoint")
        project.wait_for(lambda n=attempt: states(project, run).count("RUNNING") >= n, "the start")
        project.wait_for((project.runs / "hopeless" / "program.json").exists, "training")
        project.flow_process("hopeless").kill()
        project.wait_for(lambda: project.state(run) == "CRASHED", "the crash")
    project.wait_for(lambda: project.state(run) == "FAILED", "the refusal")
    assert "started 2 times" in project.api(f"flow_runs/{run}")["state"]["message"]
    project.wait_for(lambda: not project.processes("hopeless"), "the end of every process")


def test_a_cancelled_run_does_not_start_again(project, own_worker):
    own_worker()
    overrides = {"name": "never", "train": {"steps": 1_000_000}, "checkpoint": {"every_steps": 5}}
    run = project.run_deployment("train-flow/train-tiny", overrides=overrides)
    project.wait_for(lambda: checkpoints(project, "never"), "a committed checkpoint")
    cancelled = project.call("prefect", "flow-run", "cancel", run)
    assert cancelled.returncode == 0, cancelled.stderr
    assert project.end_of(run) == "CANCELLED"
    before = len(project.metrics("never"))
    # As the automation does that takes a cancelled run for a crashed one.
    state = {"type": "SCHEDULED", "name": "AwaitingRetry"}
    project.api(f"flow_runs/{run}/set_state", {"state": state, "force": True})
    project.wait_for(lambda: project.state(run) == "FAILED", "the refusal")
    assert "was cancelled" in project.api(f"flow_runs/{run}")["state"]["message"]
    assert len(project.metrics("never")) == before
