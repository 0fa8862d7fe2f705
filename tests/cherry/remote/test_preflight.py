"""Preflight of real hosts: all that is wrong is named, host by host, and those that are fit reduce together."""

from __future__ import annotations

import subprocess

import pytest

from base.errors import ConfigError, WorkerLostError
from cherry.cluster import ClusterSpec, NodeSpec, SshConfig
from cherry.remote.preflight import check_hosts
from tests.hosts import lab_hosts, program

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def hosts(tmp_path_factory):
    """node1, node2 and node3."""
    yield from lab_hosts(tmp_path_factory.mktemp("hosts") / "lab", 3)


def checked(spec, directory):
    """The report, and how many hosts had answered before the all-reduce."""
    seen = []
    report = check_hosts(spec, directory, lambda found: seen.append(len(found.hosts)))
    assert seen == [len(report.hosts)]
    return report


def cluster(*names, **nodes):
    return ClusterSpec(nodes=tuple(NodeSpec(host=name, **nodes) for name in names))


def test_hosts_that_are_fit_reduce_and_each_that_is_not_is_named(at_home, tmp_path):
    (tmp_path / "runs").mkdir()
    report = checked(cluster("node1", "nobody.invalid", "node2"), tmp_path / "runs")
    assert [(host.host, host.error is None) for host in report.hosts] == [
        ("node1", True), ("nobody.invalid", False), ("node2", True),
    ]  # fmt: skip
    assert abs(report.hosts[0].skew_s) < 10.0
    assert report.hosts[0].facts.sees_mark is True
    assert (report.ranks, report.ranks_per_host) == (["node1", "node2"], 1)
    assert [row["ranks"] for row in report.bandwidths] == [2, 2, 2]
    assert all(row["bus_bytes_s"] == row["algorithm_bytes_s"] > 0 for row in report.bandwidths)
    error = report.error()
    assert isinstance(error, WorkerLostError)
    assert str(error).startswith("the cluster is not fit:\n  nobody.invalid: its name cannot be resolved")
    assert checked(cluster("node1"), tmp_path / "none").error() is None, "one rank has nobody to reduce with"
    apart = cluster("node1").model_copy(update={"ssh": SshConfig(runs_directory=str(tmp_path / "disk"))})
    report = checked(apart, tmp_path / "runs")
    assert (report.error(), report.hosts[0].facts.sees_mark) == (None, None), "it need not see the runs directory"


@pytest.mark.long
def test_a_host_that_another_cannot_connect_to_is_named_before_anything_waits_for_it(at_home, tmp_path):
    space, address = at_home._space("node2"), at_home.address("node3")
    route = [program("ip"), "-n", space, "route"]
    subprocess.run([*route, "add", "blackhole", f"{address}/32"], check=True)
    try:
        report = checked(cluster("node1", "node2", "node3"), tmp_path)
    finally:
        subprocess.run([*route, "del", "blackhole", f"{address}/32"], check=True)
    assert [host.error is None for host in report.hosts] == [True, False, False]
    assert f"node3: node2 cannot connect to it at {address} port" in str(report.hosts[2].error)
    assert report.ranks == [], "one host is left"


def test_what_is_to_be_mended_is_an_error_of_the_user_s(at_home, tmp_path):
    report = checked(cluster("node1", "node2", gpus=(0,)), tmp_path)
    assert isinstance(report.error(), ConfigError)
    assert str(report.error()).count("it has 0 GPUs, and the cluster file lists GPU 0") == 2
