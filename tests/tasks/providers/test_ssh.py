"""The ssh provider on real hosts: what it checks, takes, starts and says."""

from __future__ import annotations

import pytest

from base.errors import ConfigError, OperationalError
from cherry.cluster import ClusterSpec, NodeSpec, RecoveryConfig, SshConfig, read_cluster
from tasks.providers.protocol import Reservation, write_reservation
from tasks.providers.ssh import SshProvider
from tests.hosts import lab_hosts


@pytest.fixture(scope="module")
def hosts(tmp_path_factory):
    """node1, node2 and node3."""
    yield from lab_hosts(tmp_path_factory.mktemp("hosts") / "lab", 3)


def reservation(tmp_path, *names, nodes=2, spares=(), **ssh):
    spare_nodes = tuple(NodeSpec(host=name) for name in spares)
    spec = ClusterSpec(
        nodes=tuple(NodeSpec(host=name) for name in names),
        recovery=RecoveryConfig(spares=spare_nodes),
        ssh=SshConfig(**ssh),
    )
    made = Reservation(
        provider="ssh",
        cluster="cluster.yaml",
        spec=spec,
        name="run-0",
        run_directory=str(tmp_path),
        nodes=nodes,
        ranks_per_node=1,
        master_port=None,
        memory_bytes_per_node=0,
    )
    write_reservation(tmp_path, made)
    return made


def test_more_nodes_than_are_named_are_refused_before_anyone_is_asked(tmp_path):
    with pytest.raises(ConfigError, match=r"launch\.nnodes: cluster 'cluster\.yaml' names 1 nodes \(got 2\)"):
        SshProvider().check(reservation(tmp_path, "nobody.invalid"))


@pytest.mark.slow
def test_hosts_are_taken_started_on_and_a_lost_one_is_named_or_replaced(hosts, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(hosts.home))
    provider, asked = SshProvider(), reservation(tmp_path, "node1", "node2")
    provider.check(asked)
    held = provider.acquire(asked)
    assert [host.address for host in held.hosts] == [hosts.address("node1"), hosts.address("node2")]
    (command,) = provider.commands(held, ["-m", "cherry.rank_main", "--config", "c.yaml"])
    assert command[2:4] == ["-m", "cherry.remote.supervisor"]
    assert command[-6:] == ["--nnodes=2", "--nproc_per_node=1", "-m", "cherry.rank_main", "--config", "c.yaml"]
    assert read_cluster(command[4].removeprefix("--cluster=")) == asked.spec
    assert provider.is_alive(held)
    hosts.halt("node2")
    try:
        assert not provider.is_alive(held)
        with pytest.raises(OperationalError, match=r"1 of 2 hosts are fit .* needs 2:\n  node2: it cannot be reached"):
            provider.check(asked)
        with_spare = reservation(tmp_path, "node1", "node2", spares=("node3",))
        assert provider.is_alive(held)
        assert provider.acquire(with_spare).hosts[1].address == hosts.address("node3")
    finally:
        hosts.start("node2")
    provider.release(asked)
    with pytest.raises(ConfigError, match="host key"):
        (tmp_path / "empty").touch()
        provider.check(reservation(tmp_path, "node1", "node2", known_hosts=str(tmp_path / "empty")))
