"""Samples of a node: figures, their file, and the launcher that takes them while its ranks run."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time

import pytest

from cherry.watch.node_sampler import NodeSampler, _passed, _visible, node_file, read_nodes

DEADLINE_S = 120.0
ALWAYS = {
    "cpu_utilization_percentage",
    "system_memory_usage_megabytes",
    "system_memory_usage_percentage",
    "network_receive_megabytes_per_second",
    "network_transmit_megabytes_per_second",
    "disk_usage_percentage",
    "disk_available_megabytes",
}


def test_figures_of_this_node_are_what_they_can_be(tmp_path):
    figures = NodeSampler(tmp_path).sample()
    assert figures.keys() >= ALWAYS
    assert all(value >= 0 for value in figures.values())
    assert all(value <= 100 for name, value in figures.items() if name.endswith("_percentage"))


def test_an_interface_that_comes_or_goes_between_two_samples_adds_nothing():
    before = {("network_receive", "eth0"): 100, ("network_receive", "gone"): 10**9, ("disk_read", ""): 7}
    now = {("network_receive", "eth0"): 150, ("network_receive", "new"): 10**9, ("disk_read", ""): 5}
    assert dict(_passed(before, now)) == {"network_receive": 50, "disk_read": 0}


@pytest.mark.parametrize(
    ("named", "expected"), [(None, [0, 1, 2]), ("2,0", [2, 0]), ("1,7", [1]), ("GPU-7a", [0, 1, 2]), ("", [0, 1, 2])]
)
def test_the_gpus_of_the_job_are_sampled(monkeypatch, named, expected):
    if named is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    assert _visible(3) == expected


def test_the_newest_sample_of_each_node_is_read(tmp_path):
    for node, number in (("node1", 1), ("node1", 2), ("node2", 7)):
        path = node_file(tmp_path, node)
        path.parent.mkdir(exist_ok=True)
        with path.open("a") as file:
            file.write(json.dumps({"node": node, "number": number, "time": 1.0, "figures": {}}) + "\n")
    assert {node: sample.number for node, sample in read_nodes(tmp_path).items()} == {"node1": 2, "node2": 7}


def test_a_program_samples_its_node_until_it_ends_and_the_next_one_counts_on(tmp_path):
    program = (
        "import signal, sys\nfrom pathlib import Path\nfrom cherry.watch.node_sampler import sample_node\n"
        "sample_node(Path(sys.argv[1]), every_s=0.05)\nsignal.pause()\n"
    )
    path = node_file(tmp_path, socket.gethostname())
    for least in (2, 4):
        sampling = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)])
        try:
            deadline = time.monotonic() + DEADLINE_S
            while not path.exists() or path.read_text().count("\n") < least:
                assert time.monotonic() < deadline
                time.sleep(0.02)
        finally:
            sampling.kill()
            sampling.wait()
    samples = [json.loads(line) for line in path.read_text().splitlines()]
    assert [sample["number"] for sample in samples] == list(range(1, len(samples) + 1))
    assert samples[0]["figures"].keys() >= ALWAYS
