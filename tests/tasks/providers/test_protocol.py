"""The records of a provider: read back as they were written, and the launcher's flags on each host."""

import json

import pytest

from base.errors import ConfigError, MissingFileError
from cherry.cluster import ClusterSpec, NodeSpec
from tasks.providers.protocol import (
    Host,
    Hosts,
    Reservation,
    read_hosts,
    read_reservation,
    write_hosts,
    write_reservation,
)


def hosts(count, port):
    found = tuple(Host(address=f"node{number}", cores=8, gpus=8, memory_gib=2000.0) for number in range(count))
    return Hosts(
        provider="p",
        cluster="spec.yaml",
        hosts=found,
        ranks_per_node=8,
        master_addr="node0",
        master_port=port,
        allocation="job-7",
    )


def test_records_are_read_back_as_they_were_written(tmp_path):
    reservation = Reservation(
        provider="p",
        cluster="spec.yaml",
        spec=ClusterSpec(
            kind="nodes", provider="p", gpu="H100", nodes=(NodeSpec(host="node0"), NodeSpec(host="node1", gpus=(0,)))
        ),
        name="run-0",
        run_directory=str(tmp_path),
        nodes=2,
        ranks_per_node=8,
        master_port=29500,
        memory_bytes_per_node=0,
    )
    assert read_reservation(tmp_path) is None
    write_reservation(tmp_path, reservation)
    assert read_reservation(tmp_path) == reservation
    with pytest.raises(MissingFileError):
        read_hosts(tmp_path)
    path = write_hosts(tmp_path, hosts(2, 29500))
    assert read_hosts(tmp_path) == hosts(2, 29500)
    values = json.loads((tmp_path / "hosts.json").read_text())
    (tmp_path / "hosts.json").write_text(json.dumps({**values, "color": "red"}))
    with pytest.raises(ConfigError, match=r"hosts\.json: .*color"):
        read_hosts(tmp_path)
    assert path == str(tmp_path / "hosts.json")


def test_one_host_may_leave_the_port_to_the_launcher_and_several_meet_at_the_first():
    assert hosts(1, None).launcher_flags(0) == ["--nproc_per_node=8", "--nnodes=1"]
    assert hosts(1, 29500).launcher_flags(0)[2:] == ["--master_port=29500"]
    assert hosts(2, 29500).launcher_flags(1) == [
        "--nproc_per_node=8",
        "--nnodes=2",
        "--node_rank=1",
        "--master_addr=node0",
        "--master_port=29500",
    ]
