"""Commands of several hosts as one program: whose lines pass, whose error counts, and that none outlives it."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from base.errors import ConfigError, WorkerLostError
from tasks.process import is_alive, run_command
from tasks.providers.fan_out import one_command
from tasks.providers.protocol import Host, Hosts

_ENDLESS = "import os, sys, time; print('pid', os.getpid(), flush=True)\nwhile True: time.sleep(60)"


def command(tmp_path, *programs):
    """One command that runs each program text as a host's."""
    hosts = tuple(Host(address=f"node{number}", cores=1, gpus=0, memory_gib=1) for number in range(len(programs)))
    held = Hosts(
        provider="p", cluster="c", hosts=hosts, ranks_per_node=1, master_addr="node0", master_port=29500, allocation="a"
    )
    return one_command(held, [[sys.executable, "-c", program] for program in programs], tmp_path)


def run(tmp_path, *programs):
    lines = []
    run_command(command(tmp_path, *programs), name="job", on_line=lines.append)
    return lines


def test_one_host_needs_no_program_between(tmp_path):
    assert command(tmp_path, "print(1)") == [sys.executable, "-c", "print(1)"]
    assert list(tmp_path.iterdir()) == []


def test_the_first_hosts_lines_pass_unchanged_and_the_others_with_their_address(tmp_path):
    lines = run(tmp_path, "print('step 1/2')", "print('a'); print('b')")
    assert sorted(lines) == ["node1: a", "node1: b", "step 1/2"]


def test_lines_of_hosts_that_print_at_the_same_time_stay_whole(tmp_path):
    lines = run(tmp_path, *["for i in range(2000): print('x' * 20, flush=True)"] * 2)
    assert set(lines) == {"x" * 20, f"node1: {'x' * 20}"}
    assert len(lines) == 4000


def test_the_callers_mistake_on_any_host_is_the_error_and_ends_the_others(tmp_path):
    failing = "import sys; print('error: config.yaml: no such key'); sys.exit(11)"
    lines = []
    with pytest.raises(ConfigError, match=r"config\.yaml: no such key"):
        run_command(command(tmp_path, "import sys; sys.exit(34)", failing), name="job", on_line=lines.append)
    assert "node1: error: config.yaml: no such key" in lines


def test_a_killed_host_is_a_lost_worker(tmp_path):
    killed = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    with pytest.raises(WorkerLostError, match="node1 was killed by signal 9"):
        run(tmp_path, "import time, sys; sys.stdin.read()", killed)


def test_ending_the_program_ends_every_host(tmp_path):
    started = subprocess.Popen(
        command(tmp_path, _ENDLESS, _ENDLESS),
        stdout=subprocess.PIPE,
        text=True,
        env={key: value for key, value in os.environ.items() if key != "CHERRY_PARENT"},
    )
    try:
        pids = [int(started.stdout.readline().split()[-1]) for _ in range(2)]
        records = [(pid, psutil.Process(pid).create_time()) for pid in pids]
    finally:
        started.send_signal(signal.SIGTERM)
        code = started.wait()
        started.stdout.close()
    assert code == 128 + signal.SIGTERM
    deadline = time.monotonic() + 30.0
    while any(is_alive(*record) for record in records):
        assert time.monotonic() < deadline, "a host's command is still there"
