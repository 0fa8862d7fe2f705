"""What a run was made with: a user without a name too, its devices, and what they cost."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from tasks.overrides import resolve
from tasks.records.environment import cost_figures, device_of, environment_tags, user_name

CLUSTER = "kind: nodes\ngpu: H100\nnodes: 4\ngpus_per_node: 8\nprice_per_gpu_hour: 2.5\ncurrency: EUR\n"


def test_the_packages_that_decide_the_numbers_are_named() -> None:
    tags = environment_tags()
    assert tags["python"] == ".".join(map(str, sys.version_info[:3]))
    assert "torch " in tags["packages"] and "mlflow " in tags["packages"]
    assert tags["host"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may take another uid")
def test_a_uid_without_a_name_is_its_number() -> None:
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        os.environ.pop(name, None)
    child = os.fork()
    if child == 0:
        os.setuid(54321)
        os._exit(0 if user_name() == "54321" else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_whole_nodes_are_paid_for_in_the_clusters_currency(tmp_path: Path) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text(CLUSTER)
    config = resolve("configs/671b.yaml", {"cluster": str(path), "launch": {"nnodes": 4, "nproc_per_node": 8}})
    assert device_of(config) == "32 x H100"
    assert cost_figures(config, 900.0) == {"cost/gpu_hours": 8.0, "cost/EUR": 20.0}
    path.write_text(CLUSTER.replace("price_per_gpu_hour: 2.5\n", ""))
    assert cost_figures(config, 900.0) == {"cost/gpu_hours": 8.0}


def test_named_hosts_count_the_gpus_that_they_list(tmp_path: Path) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text("nodes: [{host: a, gpus: [0, 1]}, {host: b, gpus: [0, 1]}]\n")
    config = resolve("configs/tiny.yaml", {"cluster": str(path), "launch": {"nnodes": 2, "nproc_per_node": 2}})
    assert device_of(config) == "4 x GPU"
    assert cost_figures(config, 900.0) == {"cost/gpu_hours": 1.0}
    path.write_text("nodes: [{host: a}, {host: b}]\n")
    assert device_of(config) == "2 hosts"
    assert cost_figures(config, 900.0) == {}


@pytest.mark.skipif(Path("/proc/driver/nvidia/gpus").is_dir(), reason="this machine has a GPU")
def test_a_machine_without_gpus_costs_no_gpu_hours() -> None:
    config = resolve("configs/tiny.yaml", {})
    assert device_of(config).startswith("CPU (")
    assert cost_figures(config, 3600.0) == {}
