"""A run that crashes after Prefect's server was killed and started again: the new server knows nothing of its begin."""

import pytest

from tests.project import kill, running_project

pytestmark = [pytest.mark.slow, pytest.mark.long]
STEPS = 120
LONG = {"train": {"steps": STEPS}, "checkpoint": {"every_steps": 5}}


@pytest.fixture
def own_project(tmp_path):
    """A project with a server and a worker of its own."""
    with running_project(tmp_path) as made:
        worker = made.start("prefect", "worker", "start", "--pool", "cherry", log="worker")
        yield made
        kill(worker)


def test_a_run_that_crashes_after_a_restart_of_the_server_starts_again(own_project):
    run = own_project.run_deployment("train-flow/train-tiny", overrides={"name": "anew", **LONG})
    committed = (own_project.runs / "anew" / "train" / "checkpoints").glob
    own_project.wait_for(lambda: list(committed("step_*/COMMITTED")), "a committed checkpoint")
    own_project.restart_server()
    own_project.flow_process("anew").kill()

    def starts():
        return [one["type"] for one in own_project.api(f"flow_run_states/?flow_run_id={run}")].count("RUNNING")

    # By itself, Prefect lets the crash start nothing: it waits for the event of the run's begin.
    own_project.wait_for(lambda: starts() > 1, "the second start")
    assert own_project.end_of(run) == "COMPLETED"
    assert starts() == 2
    assert [one["step"] for one in own_project.metrics("anew")] == list(range(1, STEPS + 1))
