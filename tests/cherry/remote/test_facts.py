"""Facts of this machine, and what makes a host unfit for a job: each reason by itself, in words."""

import re
import socket
import time

import psutil
import pytest
import torch

from cherry.cluster import NodeSpec
from cherry.remote.facts import MAX_SKEW_S, HostFacts, Needs, Unfit, code_digest, collect_facts, unfit
from cherry.remote.gpus import GpuFacts

NOW = 1_800_000_000.0
NODE = NodeSpec(host="node2")


def facts(**changes):
    values = {
        "hostname": "node2",
        "python": "3.11.7",
        "torch": "2.13.0",
        "code": "abc",
        "cores": 8,
        "memory_gib": 100.0,
        "gpus": 4,
        "time": NOW,
        "free_bytes": 1 << 40,
        "sees_mark": True,
        "own_address": "127.0.1.1",  # as Debian has it
        "interfaces": {"lo": "127.0.0.1", "eth0": "10.0.0.2", "ib0": "10.1.0.2"},
        "reached_at": "10.0.0.2",
        "free_port": 40000,
    }
    return HostFacts(**{**values, **changes})


def gpu(index, **changes):
    told = {"uncorrected_ecc_errors": 0, "remap_pending": False, "remap_failed": False, "recovery": None}
    values = {"index": index, "name": "H200", "memory_bytes": 1 << 37, "used_bytes": 0, "processes": 0, **told}
    return GpuFacts(**{**values, **changes})


def reasons(found, node=NODE, ranks=4, interface=None, like=None):
    return list(unfit(node, found, Needs(ranks, interface, "abc", like), now=NOW))


def test_this_machine_s_facts(tmp_path, monkeypatch):
    (tmp_path / "mark").touch()
    monkeypatch.setenv("SSH_CONNECTION", "10.9.9.9 4711 127.0.0.1 22")
    found = collect_facts(str(tmp_path / "not" / "yet"), str(tmp_path / "mark"))
    assert (found.torch, found.cuda) == (torch.__version__, torch.version.cuda)
    assert found.hostname == socket.gethostname()
    assert abs(found.time - time.time()) < 60.0
    assert abs(found.free_bytes - psutil.disk_usage(str(tmp_path)).free) < 1 << 30
    assert found.sees_mark is True
    assert found.code == code_digest()
    assert found.interface(None) == "lo"
    assert collect_facts(None, str(tmp_path / "other")).sees_mark is False
    with socket.socket() as server:
        server.bind(("", found.free_port))


def test_a_host_as_it_should_be_is_fit():
    assert reasons(facts(), like=facts(hostname="node1")) == []
    assert facts().interface(None) == "eth0"
    assert (facts().address(None), facts().address("ib0")) == ("10.0.0.2", "10.1.0.2")


@pytest.mark.parametrize(
    ("changes", "arguments", "words"),
    [
        ({"torch": None}, {}, "torch is not installed"),
        ({"torch": "2.12.0"}, {"like": facts(hostname="node1")}, "it has torch 2.12.0, node1 has 2.13.0"),
        ({"cuda": "12.8"}, {"like": facts(hostname="node1", cuda="13.0")}, "it has cuda 12.8, node1 has 13.0"),
        ({"gpu_facts": (gpu(1, remap_failed=True),)}, {}, "GPU 1 has bad memory that it cannot remap"),
        ({"python": "3.12.1"}, {"like": facts(hostname="node1")}, "it has python 3.12.1, node1 has 3.11.7"),
        ({"code": "abd"}, {}, "its copy of this project differs"),
        (
            {},
            {"node": NodeSpec(host="node2", gpus=(3, 4)), "ranks": 2},
            "it has 4 GPUs, and the cluster file lists GPU 4",
        ),
        ({}, {"node": NodeSpec(host="node2", gpus=(0, 1))}, "4 ranks are to run there .* and it has 2 GPUs"),
        ({}, {"ranks": 8}, "8 ranks are to run there .* and it has 4 GPUs"),
        ({}, {"interface": "ib1"}, "it has no network interface ib1 .* it has lo, eth0, ib0"),
        ({"reached_at": "192.0.2.1"}, {}, r"its own name resolves to 127\.0\.1\.1, where no other host reaches it"),
        ({"sees_mark": False}, {}, "it does not see the run directory"),
    ],
)
def test_what_is_the_callers_to_mend(changes, arguments, words):
    (reason,) = reasons(facts(**changes), **arguments)
    assert re.search(words, reason.text)
    assert not reason.may_pass


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"time": NOW + MAX_SKEW_S + 5}, "differs by +35 s"), ({"free_bytes": 1 << 29}, "0.50 GiB are free")],
)
def test_what_may_pass_by_itself(changes, words):
    (reason,) = reasons(facts(**changes))
    assert isinstance(reason, Unfit) and reason.may_pass and words in reason.text


def test_a_gpu_in_use_counts_where_it_has_to_be_free_and_is_one_that_is_used():
    busy = facts(gpu_facts=(gpu(0), gpu(1, processes=3, used_bytes=1 << 30)))
    assert reasons(busy) == []
    free = Needs(1, None, "abc", free_gpus=True)
    assert list(unfit(NodeSpec(host="node2", gpus=(0,)), busy, free, now=NOW)) == []
    (reason,) = unfit(NODE, busy, free, now=NOW)
    assert reason.may_pass and reason.text.startswith("GPU 1 is in use (3 processes, 1.0 GiB); end what runs there")


def test_a_host_behind_another_address_is_fit_where_its_name_or_the_file_says_where_it_is():
    behind = {"reached_at": "192.0.2.1"}
    assert reasons(facts(**behind, own_address="10.0.0.2")) == []
    assert reasons(facts(**behind), interface="eth0") == []


def test_a_host_without_gpus_may_run_any_number_of_ranks():
    assert reasons(facts(gpus=0), ranks=32) == []
