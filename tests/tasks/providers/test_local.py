"""The local provider at its limits, and the command that it starts."""

import sys

import pytest

from base.errors import ConfigError, OperationalError
from cherry.cluster import ClusterSpec
from tasks.providers.local import LocalProvider
from tasks.providers.protocol import Reservation


def reservation(**changes):
    values = {
        "provider": "local",
        "cluster": "local",
        "spec": ClusterSpec(kind="local", slots=2),
        "name": "run-0",
        "run_directory": "runs/run",
        "nodes": 1,
        "ranks_per_node": 2,
        "master_port": None,
        "memory_bytes_per_node": 0,
    }
    return Reservation(**{**values, **changes})


def test_this_machine_is_one_host_with_its_slots():
    local = LocalProvider()
    local.check(reservation())
    with pytest.raises(ConfigError, match=r"launch\.nproc_per_node: .* 2 slots \(got 3\)"):
        local.check(reservation(ranks_per_node=3))
    with pytest.raises(ConfigError, match=r"launch\.nnodes: .* one node.* \(got 2\)"):
        local.check(reservation(nodes=2))


def test_memory_that_is_not_free_now_may_be_free_later():
    local = LocalProvider()
    local.check(reservation(memory_bytes_per_node=1))
    with pytest.raises(OperationalError, match=r"memory: .* need 1048576\.0 GiB here, .* GiB are free"):
        local.check(reservation(memory_bytes_per_node=2**50))


@pytest.mark.parametrize(("port", "flags"), [(None, []), (29500, ["--master_port=29500"])])
def test_the_launcher_runs_here(port, flags):
    local = LocalProvider()
    hosts = local.acquire(reservation(master_port=port))
    assert local.is_alive(hosts)
    start = [sys.executable, "-P", "-m", "cherry.launcher", "--nproc_per_node=2", "--nnodes=1", *flags]
    assert local.commands(hosts, ["train.py", "--x"]) == [[*start, "train.py", "--x"]]
