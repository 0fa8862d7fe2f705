"""A job on several hosts when one is lost, hangs or is cut off, and when its supervisor ends: real hosts over ssh."""

from __future__ import annotations

import signal
from contextlib import suppress
from typing import Any

import psutil
import pytest

from cherry.watch.node_sampler import read_nodes
from cherry.watch.rank_report import read_job
from tests.processes import command_line
from tests.supervised import until

pytestmark = pytest.mark.slow
NODE3_FOR_NODE2 = [("began", ["node1", "node2"]), ("ended", "node2"), ("began", ["node1", "node3"]), ("ended", None)]


def rank_of(supervised: Any, host: str) -> Any:
    """The training process on a host."""
    return until(
        lambda: next(
            (one for one in supervised.hosts.processes(host) if {"-u", "train.py"} <= set(command_line(one))), None
        ),
        f"a rank on {host}",
    )


def test_two_hosts_train_as_two_ranks_of_one(supervised, whole):
    supervised.start()
    assert supervised.code() == 0, supervised.output
    assert supervised.job.losses == whole
    assert supervised.events == [("began", ["node1", "node2"]), ("ended", None)]
    until(lambda: not supervised.left(), "the agents have ended too")


def test_a_host_that_loses_its_power_is_replaced_and_the_run_goes_on_exactly(supervised, whole):
    supervised.start(recovery={"spares": [{"host": "node3"}]})
    supervised.wait_for_checkpoint(8)
    supervised.hosts.power_loss("node2")
    assert supervised.code() == 0, supervised.output
    assert supervised.job.losses == whole
    assert supervised.events == NODE3_FOR_NODE2
    assert "node2 is lost: the connection broke" in supervised.output
    assert "resumed from" in supervised.output
    until(lambda: not supervised.left(), "the agents have ended too")


@pytest.mark.long
def test_a_host_that_is_cut_off_and_comes_back_never_trains_beside_its_successor(supervised, whole):
    supervised.start(recovery={"spares": [{"host": "node3"}]})
    supervised.wait_for_checkpoint(8)
    old = rank_of(supervised, "node2")
    supervised.hosts.cut("node2")
    until(lambda: ("ended", "node2") in supervised.events, "the loss is noticed")
    # Attempts are recorded as ended only once no rank of theirs can be left, seen from outside the network.
    assert not old.is_running()
    supervised.hosts.join("node2")
    assert supervised.code() == 0, supervised.output
    assert supervised.job.losses == whole
    assert [event for event, _ in supervised.events] == ["began", "ended", "began", "ended"]
    until(lambda: not supervised.left(), "the agents have ended too")


def test_a_link_that_heals_while_the_lease_lasts_does_not_revive_the_old_job(supervised, whole):
    supervised.start(recovery={"spares": [{"host": "node3"}]})
    supervised.wait_for_checkpoint(8)
    old = rank_of(supervised, "node1"), rank_of(supervised, "node2")
    supervised.hosts.cut("node2")
    until(lambda: "waiting" in supervised.output, "the loss is noticed")
    supervised.hosts.join("node2")
    until(lambda: len(supervised.events) == 3, "the next attempt")
    assert not any(one.is_running() for one in old)
    assert supervised.code() == 0, supervised.output
    assert supervised.job.losses == whole
    until(lambda: not supervised.left(), "the agents have ended too")


@pytest.mark.long
def test_fewer_hosts_go_on_where_no_spare_is_left_and_the_file_allows_it(supervised):
    supervised.start(recovery={"min_nodes": 1})
    supervised.wait_for_checkpoint(4)
    supervised.hosts.power_loss("node1")
    assert supervised.code() == 0, supervised.output
    assert supervised.events[2:] == [("began", ["node2"]), ("ended", None)]
    assert [line["step"] for line in supervised.job.metrics] == list(range(1, 33))


@pytest.mark.long
def test_a_killed_rank_costs_an_attempt(supervised, whole):
    supervised.start()
    supervised.wait_for_checkpoint(4)
    rank_of(supervised, "node2").kill()
    assert supervised.code() == 0, supervised.output
    assert "was killed by SIGKILL" in supervised.output
    assert supervised.events[2:] == [("began", ["node1", "node2"]), ("ended", None)]
    assert supervised.job.losses == whole


WRONG = """
import socket, sys
import torch.distributed as dist
from base.errors import HardwareError
from cherry import rank_main
from cherry.hooks.protocol import TrainerHook

class Wrong(TrainerHook):
    def on_step_end(self, record):
        names = [""] * dist.get_world_size()
        dist.all_gather_object(names, socket.gethostname())
        if record.step == 9 and "node2" in names:
            raise HardwareError("other bits on rank 1 (host node2)", ("node2",))

rank_main.main(sys.argv[1:], hooks=[Wrong()])
"""


def test_a_host_that_computes_wrongly_is_left_out(supervised, whole, tmp_path):
    program = tmp_path / "wrong.py"
    program.write_text(WRONG)
    supervised.start(program=str(program), recovery={"spares": [{"host": "node3"}]})
    assert supervised.code() == 0, supervised.output
    assert [hosts for event, hosts in supervised.events if event == "began"] == [["node1", "node2"], ["node1", "node3"]]
    assert "node2: is left out, as a device there computed wrongly" in supervised.output
    assert supervised.job.losses == whole


def test_a_stopped_rank_is_found_by_its_silence_and_every_rank_leaves_its_stacks(supervised):
    supervised.start("--steps=100000", recovery={"hang_s": 8.0})
    until(lambda: supervised.output.count("\nstep ") > 3, "steps")
    rank_of(supervised, "node2").send_signal(signal.SIGSTOP)
    until(lambda: len(supervised.events) == 3, "the second attempt")
    assert "the job hangs: no step for" in supervised.output
    # Rank 0 waits in a collective for the one that was stopped.
    assert "most recent call first" in (supervised.job.directory / "train" / "rank-0.log").read_text()
    (kept,) = (supervised.job.directory / "train" / "stacks").iterdir()
    assert f"The ranks' stacks are in {kept}" in supervised.output
    parts = dict(part.split(" =====\n", 1) for part in kept.read_text().split("===== ")[1:])
    assert parts.keys() == {"rank 0", "rank 1"}
    assert "most recent call first" in parts["rank 0"] and "cherry/trainer.py" in parts["rank 0"]
    assert parts["rank 1"].startswith("no stack came")
    train = supervised.job.directory / "train"
    assert [(report.rank, report.host) for report in read_job(train)] == [(0, "node1"), (1, "node2")]
    assert read_nodes(train).keys() == {"node1", "node2"}
    until(lambda: "resumed from" in supervised.output, "the second attempt trains")


@pytest.mark.parametrize(
    "number", [signal.SIGKILL, signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.long)]
)
def test_nothing_is_left_on_any_host_however_the_supervisor_ends(supervised, number):
    process = supervised.start("--steps=100000")
    until(lambda: supervised.job.metrics, "the first step")
    assert len([line for line in supervised.left() if "cherry.launcher" in line]) == 2
    process.send_signal(number)
    assert supervised.code() == (-number if number == signal.SIGKILL else 128 + number), supervised.output
    until(lambda: not supervised.left(), "nothing is left on the hosts")
    assert [event for event, _ in supervised.events] == (["began"] if number == signal.SIGKILL else ["began", "ended"])


@pytest.mark.long
def test_whoever_comes_after_a_killed_supervisor_waits_for_the_lease_of_a_host_that_is_cut_off(supervised, whole):
    supervised.start(recovery={"spares": [{"host": "node3"}]})
    supervised.wait_for_checkpoint(8)
    old = rank_of(supervised, "node2")
    supervised.hosts.cut("node2")
    supervised.end()
    supervised.start(recovery={"spares": [{"host": "node3"}]})
    until(lambda: len(supervised.events) == 2, "the attempt of the second supervisor")
    assert not old.is_running()
    assert supervised.code() == 0, supervised.output
    assert "an earlier supervisor of this run was killed" in supervised.output
    assert supervised.job.losses == whole


def test_a_mistake_of_the_caller_ends_the_run_at_its_first_attempt(supervised):
    supervised.start("--batch_size=7")
    assert supervised.code() == 11
    assert "train.batch_size: must be divisible by" in supervised.output
    assert [event for event, _ in supervised.events] == ["began", "ended"]
    until(lambda: not supervised.left(), "the agents have ended too")


def launcher_on(supervised: Any, host: str) -> Any:
    return next(one for one in supervised.hosts.processes(host) if "cherry.launcher" in command_line(one))


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.long)])
def test_a_host_whose_launcher_is_told_to_end_is_lost_and_the_job_goes_on_on_another(supervised, whole, number):
    supervised.start(recovery={"spares": [{"host": "node3"}]})
    supervised.wait_for_checkpoint(8)
    launcher_on(supervised, "node2").send_signal(number)
    assert supervised.code() == 0, supervised.output
    assert supervised.job.losses == whole
    assert supervised.events == NODE3_FOR_NODE2
    assert f"node2 counts as lost: {number.name} ended the job there, which was not sent from here" in supervised.output
    until(lambda: not supervised.left(), "the agents have ended too")


@pytest.mark.long
@pytest.mark.parametrize("host", ["node1", "node2"])
def test_a_host_that_is_shut_down_orderly_is_replaced(supervised, whole, host):
    supervised.start(recovery={"spares": [{"host": "node3"}]})
    supervised.wait_for_checkpoint(8)
    # As an init does: SIGTERM to every process, and what is left some time later ends with the machine.
    for one in supervised.hosts.processes(host):
        with suppress(psutil.NoSuchProcess):
            one.terminate()
    until(lambda: len(supervised.events) > 1, "the loss is noticed")
    supervised.hosts.halt(host)
    assert supervised.code() == 0, supervised.output
    assert supervised.job.losses == whole
    assert supervised.events[1] == ("ended", host), supervised.output
    assert supervised.events[-1] == ("ended", None)
    until(lambda: not supervised.left(), "the agents have ended too")


def test_ctrl_c_cancels_a_job_that_waits_for_a_host_in_place_of_one_that_was_shut_down(supervised):
    process = supervised.start("--steps=100000", recovery={"backoff_s": 100.0})
    until(lambda: supervised.job.metrics, "the first step")
    launcher_on(supervised, "node2").terminate()
    until(lambda: "counts as lost" in supervised.output, "the host counts as lost")
    process.send_signal(signal.SIGINT)
    assert supervised.code() == 128 + signal.SIGINT, supervised.output
    assert supervised.events == [("began", ["node1", "node2"]), ("ended", "node2")]
    until(lambda: not supervised.left(), "nothing is left on the hosts")
