"""Hosts for an attempt: those that answer on real ssh, and which of them are taken."""

from __future__ import annotations

import asyncio
from collections import Counter
from types import SimpleNamespace

import pytest

from base.errors import ConfigError, WorkerLostError
from cherry.cluster import ClusterSpec, NodeSpec, RecoveryConfig
from cherry.remote.gather import Gathered, Refusal, choose, gather
from cherry.remote.job import Job


def job_of(*names: str, nodes: int, spares: tuple[str, ...] = (), program=("my_program.py",), min_nodes=None) -> Job:
    recovery = RecoveryConfig(spares=tuple(NodeSpec(host=name) for name in spares), min_nodes=min_nodes)
    return Job(ClusterSpec(nodes=tuple(NodeSpec(host=name) for name in names), recovery=recovery), nodes, 1, program)


def answered(*names: str, refused: dict | None = None) -> Gathered:
    refusals = [Refusal(host, error) for host, error in (refused or {}).items()]
    return Gathered([SimpleNamespace(node=NodeSpec(host=name)) for name in names], refusals)


def chosen(job: Job, gathered: Gathered, **failures: int) -> list[str]:
    return [session.node.host for session in choose(job, gathered, Counter(failures))]


def test_the_first_hosts_are_taken_and_one_that_failed_gives_way_to_a_spare():
    job = job_of("a", "b", "c", nodes=2, spares=("d",))
    assert chosen(job, answered("a", "b", "c", "d")) == ["a", "b"]
    assert chosen(job, answered("b", "c", "d")) == ["b", "c"]
    assert chosen(job, answered("a", "b", "c", "d"), a=1) == ["b", "c"]
    assert chosen(job, answered("a", "b"), a=1) == ["a", "b"], "there is no other"


def test_fewer_hosts_are_taken_down_to_the_least_that_the_file_allows():
    lost = {"c": WorkerLostError("c: it cannot be reached")}
    assert chosen(job_of("a", "b", "c", nodes=3, min_nodes=2), answered("a", "b", refused=lost)) == ["a", "b"]
    with pytest.raises(WorkerLostError, match=r"2 of 3 hosts are fit for the job, which needs 3:\n  c: it cannot be"):
        chosen(job_of("a", "b", "c", nodes=3), answered("a", "b", refused=lost))
    with pytest.raises(ConfigError, match="which needs 2"):
        refused = {**lost, "b": ConfigError("b: torch is not installed there")}
        chosen(job_of("a", "b", "c", nodes=3, min_nodes=2), answered("a", refused=refused))


def test_a_number_of_hosts_on_which_the_configuration_is_not_valid_is_left_out(job_config):
    program = ("train.py", f"--config={job_config}", "--batch_size=4")
    job = job_of("a", "b", "c", "d", nodes=4, min_nodes=1, program=program)
    assert chosen(job, answered("a", "b", "c")) == ["a", "b"]


@pytest.mark.slow
def test_hosts_answer_or_are_named_with_their_reason(at_home, tmp_path):
    (tmp_path / "run").mkdir()

    async def ask(job: Job):
        gathered = await gather(job)
        await gathered.close()
        return [session.node.host for session in gathered.sessions], gathered.refusals

    program = ("train.py", f"--run_dir={tmp_path / 'run'}")
    fit, refused = asyncio.run(ask(job_of("node1", "node2", "nobody.invalid", nodes=2, program=program)))
    assert fit == ["node1", "node2"]
    assert [(one.host, type(one.error)) for one in refused] == [("nobody.invalid", WorkerLostError)]
    assert list((tmp_path / "run").iterdir()) == [], "the mark is gone"
    spec = ClusterSpec(nodes=(NodeSpec(host="node1", gpus=(0,)), NodeSpec(host="node2", gpus=(0,))))
    fit, refused = asyncio.run(ask(Job(spec, 2, 1, ("my_program.py",))))
    assert fit == []
    assert [str(one.error).partition(",")[0] for one in refused] == ["node1: it has 0 GPUs", "node2: it has 0 GPUs"]


@pytest.mark.slow
def test_a_machine_under_two_names_is_one_host(at_home):
    config = at_home.home / ".ssh" / "config"
    config.write_text(config.read_text() + config.read_text().replace("Host node1\n", "Host twin\n"))

    async def ask():
        gathered = await gather(job_of("node1", "twin", nodes=2))
        await gathered.close()
        return [session.node.host for session in gathered.sessions], gathered.refusals

    fit, (refusal,) = asyncio.run(ask())
    assert fit == ["node1"]
    assert str(refusal.error) == "twin: it is the same machine as node1. Name each host once."
