"""A job under a real Slurm: to its end, cancelled, at its time limit, and when nodes or their daemons are lost."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.processes import command_line
from tests.queued import Queued
from tests.slurm import SlurmLab, slurm_lab
from tests.supervised import FLAGS, until

pytestmark = pytest.mark.slow
# On the first node that it meets, a device computes something else.
WRONG = """\
import os, socket
from base.errors import HardwareError
from cherry.hooks.protocol import TrainerHook
from cherry.rank_main import main

class Wrong(TrainerHook):
    def on_step_end(self, record):
        if "SLURM_RESTART_COUNT" not in os.environ:
            raise HardwareError("it computed something else", hosts=(socket.gethostname(),))

main(hooks=[Wrong()])
"""


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmLab]:
    """A cluster of node1, node2 and node3."""
    yield from slurm_lab(tmp_path_factory.mktemp("lab"), 3)


@pytest.fixture
def queued(make_job: Callable[[str], Any], lab: SlurmLab, environment: dict[str, str]) -> Iterator[Queued]:
    """A job for this cluster, whose nodes are all there at its begin."""
    lab.until(lambda: set(lab.states().values()) == {"idle"}, f"all nodes are idle: {lab.states()}")
    job = Queued(make_job("job"), lab, environment)
    yield job
    job.end()
    lab.call("scancel", "--name=job")
    lab.until(lambda: not lab.call("squeue", "--noheader"), "no job is left")


def test_two_nodes_train_as_two_ranks_of_one_machine(queued, whole):
    queued.start()
    assert queued.code() == 0, queued.all_output
    assert queued.job.losses == whole
    assert queued.events == [("began", ["node1", "node2"]), ("ended", None)]
    assert "RUNNING on node[1-2]" in queued.output
    assert "step 32/32" in queued.output
    assert queued.slurm_job["JobState"] == "COMPLETED"
    until(lambda: not queued.left(), "nothing is left on the nodes")


@pytest.mark.long
def test_a_job_that_is_cancelled_leaves_nothing_and_does_not_come_back(queued):
    queued.start("--steps=100000")
    until(lambda: len(queued.job.metrics) > 3, "steps")
    job = queued.slurm_job
    queued.lab.call("scancel", job["JobId"])
    assert queued.code() == 10, queued.all_output
    assert f"Slurm job {job['JobId']} was cancelled, so it is not started again" in queued.output
    until(lambda: not queued.left(), "nothing is left on the nodes")
    assert queued.slurm_job["JobState"] == "CANCELLED"
    assert queued.lab.call("squeue", "--noheader") == ""


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_job_is_cancelled_with_the_program_that_follows_it(queued, number):
    process = queued.start("--steps=100000")
    until(lambda: len(queued.job.metrics) > 3, "steps")
    process.send_signal(number)
    assert queued.code() == 128 + number, queued.all_output
    until(lambda: not queued.left(), "nothing is left on the nodes")
    assert (queued.slurm_job["JobState"], queued.slurm_job["Requeue"]) == ("CANCELLED", "0")


@pytest.mark.long
def test_whoever_comes_after_a_program_that_was_killed_cancels_its_job(queued):
    queued.start("--steps=100000")
    queued.wait_for_checkpoint(8)
    before = queued.slurm_job["JobId"]
    queued.end()
    queued.start("--steps=100000")
    until(lambda: "resumed from" in queued.output, "the second job goes on")
    assert f"cancelled Slurm job {before} (job)" in queued.output
    assert [job["JobState"] for job in queued.lab.jobs()][-2:] == ["CANCELLED", "RUNNING"]


@pytest.mark.long
def test_before_the_time_limit_a_job_saves_ends_and_goes_on_where_it_was(queued, whole):
    queued.start("--steps=100000", time="1", warning_s=30)
    until(lambda: [event for event, _ in queued.events][:3] == ["began", "ended", "began"], "the second start")
    first = queued.attempts[1]
    assert first["code"] == 38, queued.all_output
    until(lambda: "resumed from" in queued.output, "it resumes")
    saved = int(first["error"].split("step ")[1].split()[0])
    assert f"step_{saved}: {saved} steps" in queued.output
    until(lambda: len(queued.job.metrics) > max(saved, 32), "steps of later starts")
    assert [line["step"] for line in queued.job.metrics][: saved + 1] == list(range(1, saved + 2))
    assert queued.job.losses[:32] == whole
    assert int(queued.slurm_job["Restarts"]) >= 1


@pytest.mark.long
def test_a_job_is_not_queued_again_more_often_than_it_may(queued):
    queued.start("--steps=100000", requeues=0)
    until(lambda: len(queued.job.metrics) > 3, "steps")
    queued.lab.call("scancel", "--batch", "--signal=USR1", queued.slurm_job["JobId"])
    assert queued.code() == 38, queued.all_output
    assert "told to end: step" in queued.output
    assert "The job was started again 0 times (slurm.requeues)" in queued.output
    assert queued.slurm_job["Restarts"] == "0"


@pytest.mark.long
def test_a_node_that_loses_its_power_is_replaced_and_the_run_goes_on_exactly(queued, whole):
    queued.start()
    queued.wait_for_checkpoint(8)
    queued.hosts.power_loss("node2")
    try:
        assert queued.code() == 0, queued.all_output
    finally:
        queued.hosts.start("node2")
        queued.lab.start_slurmd("node2")
    assert queued.job.losses == whole
    assert queued.events[-2:] == [("began", ["node1", "node3"]), ("ended", None)]
    assert "resumed from" in queued.output
    assert queued.slurm_job["Restarts"] == "1"


@pytest.mark.long
def test_a_node_whose_slurmd_is_killed_is_replaced_and_never_trains_beside_its_successor(queued):
    queued.start("--steps=100000")
    queued.wait_for_checkpoint(8)
    queued.lab.kill_slurmd("node2")
    try:
        until(lambda: queued.events[-1] == ("began", ["node1", "node3"]), "the start on other nodes")
        reached = len(queued.job.metrics)
        until(lambda: "resumed from" in queued.output and len(queued.job.metrics) > reached, "it goes on")
        assert not [one for one in queued.hosts.processes("node2") if "train.py" in command_line(one)]
    finally:
        queued.lab.start_slurmd("node2")
    assert [line["step"] for line in queued.job.metrics] == list(range(1, len(queued.job.metrics) + 1))


@pytest.mark.long
def test_a_mistake_of_the_caller_ends_the_job_at_its_first_start(queued):
    queued.start("--batch_size=7")
    assert queued.code() == 11, queued.all_output
    assert "train.batch_size: must be divisible by" in queued.output
    assert [event for event, _ in queued.events] == ["began", "ended"]
    assert queued.slurm_job["JobState"] == "FAILED"


@pytest.mark.long
def test_a_node_that_computes_wrongly_is_left_out_of_the_next_start(queued, tmp_path):
    (tmp_path / "wrong.py").write_text(WRONG)
    program = [str(tmp_path / "wrong.py"), "--config", str(queued.job.config), "--run_dir", str(queued.job.directory)]
    queued.start_program([*program, *FLAGS], nodes=1, exclude=["node3"])
    assert queued.code() == 0, queued.all_output
    assert queued.events == [("began", ["node1"]), ("ended", "node1"), ("began", ["node2"]), ("ended", None)]
    assert "left out from now on: node1" in queued.output
    left_out = queued.lab.call("scontrol", "show", "hostnames", queued.slurm_job["ExcNodeList"]).split()
    assert sorted(left_out) == ["node1", "node3"]
