"""The agent as its supervisor drives it, by pipes: messages, and every way in which a job's processes are ended."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from base import storage
from cherry.remote.agent import Agent, Sender
from cherry.remote.prepared_data import copy_committed
from tests.processes import is_alive

ROOT = Path(__file__).resolve().parents[3]
DEADLINE_S = 240.0
# A rank that starts a process of its own, says so, and never ends.
ENDLESS = """
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"])
print("pids", os.getpid(), child.pid, flush=True)
while True: time.sleep(60)
"""


class Driver:
    """The supervisor's end of an agent's pipes."""

    def __init__(self, *, answers_ticks: bool = True) -> None:
        self.answers_ticks = answers_ticks
        self.tick = None
        self.process = subprocess.Popen(
            [sys.executable, "-m", "cherry.remote.agent"],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def send(self, **message) -> None:
        self.process.stdin.write(json.dumps(message).encode() + b"\n")
        self.process.stdin.flush()

    def read(self) -> dict:
        """The next message that is no tick, or an empty one at the end."""
        while line := self.process.stdout.readline():
            message = json.loads(line)
            if "tick" not in message:
                return message
            self.tick = message["tick"]
            if self.answers_ticks:
                self.send(tock=self.tick)
        return {}

    def until(self, key: str) -> dict:
        """The next message of a kind."""
        while message := self.read():
            if key in message:
                return message
        raise AssertionError(f"no {key}")

    def ready(self) -> None:
        """Wait for the first tick, without which no job may start."""
        self.send(ask={"directory": None, "mark": None})
        self.until("facts")
        assert self.tick is not None

    def start(self, *arguments: str, lease_s: float = 60.0, **environment: str) -> None:
        self.ready()
        self.send(start={"arguments": arguments, "environment": environment, "lease_s": lease_s, "tock": self.tick})


@pytest.fixture
def driver():
    made = Driver()
    yield made
    made.process.kill()
    made.process.wait()
    for pipe in (made.process.stdin, made.process.stdout):
        with contextlib.suppress(BrokenPipeError):
            pipe.close()


def pids_of(message) -> list[psutil.Process]:
    """The processes that a line of the endless program names, and its launcher."""
    rank = psutil.Process(int(message["line"].split()[1]))
    return [rank, psutil.Process(int(message["line"].split()[2])), rank.parent()]


def wait_for_end(processes) -> None:
    gone, alive = psutil.wait_procs(processes, timeout=DEADLINE_S)
    assert [one for one in alive if is_alive(one)] == [], gone


def test_facts_are_told_and_the_end_of_the_supervisor_is_the_agent_s(driver):
    driver.send(ask={"directory": str(ROOT), "mark": str(ROOT / "README.md")})
    facts = driver.until("facts")["facts"]
    assert facts["sees_mark"] is True
    assert facts["python"] == ".".join(map(str, sys.version_info[:3]))
    driver.process.stdin.close()
    assert driver.process.wait(DEADLINE_S) == 0


def test_prepared_data_is_fetched_while_ticks_go_on(driver, prepared_data, s3, tmp_path):
    copy_committed(str(prepared_data), f"{s3}/data")
    keys = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    driver.ready()
    for data, told in ((f"{s3}/data", None), (f"{s3}/none", "MissingFileError")):
        driver.send(fetch={"data": data, "directory": str(tmp_path / "data"), "environment": keys})
        error = driver.until("fetched")["fetched"]["error"]
        assert (error and error["kind"]) == told
    assert not storage.damage(str(tmp_path / "data")), "what is there stays where nothing comes"


@pytest.mark.slow
def test_a_job_s_lines_progress_environment_and_error_are_told(driver, tmp_path):
    program = tmp_path / "program.py"
    program.write_text(
        "import os, sys, time\nfrom base.errors import DataError\nfrom base.progress import busy, print_progress\n"
        "from cherry.rank_main import write_for_launcher\n"
        "print('gpus', os.environ['CUDA_VISIBLE_DEVICES'], flush=True)\n"
        "with busy('evaluation'):\n"
        f"    while not os.path.exists({str(tmp_path / 'heard')!r}): time.sleep(0.05)\n"
        "print_progress('half', 0.5)\n"
        "write_for_launcher(DataError('corpus: line 3 is no JSON'))\n"
        "sys.exit(13)\n"
    )
    driver.start("--nproc_per_node=1", str(program), CUDA_VISIBLE_DEVICES="2,5")
    told = []
    while "ended" not in (message := driver.read()):
        told.append(message)
        if message.get("busy") is not None:  # told while the program prints nothing
            (tmp_path / "heard").touch()
    assert {"line": "gpus 2,5", "fraction": None} in told
    assert {"line": "half", "fraction": 0.5} in told
    assert [one["busy"] for one in told if "busy" in one] == ["evaluation", None]
    assert message["ended"]["code"] == 13
    assert message["ended"]["error"]["kind"] == "DataError"
    assert message["ended"]["error"]["message"] == "corpus: line 3 is no JSON"
    assert driver.process.wait(DEADLINE_S) == 0


@pytest.mark.slow
@pytest.mark.parametrize("end", ["message", "closed", "killed", "terminated", "silent"])
def test_every_end_of_the_supervisor_or_the_agent_ends_the_whole_tree(driver, tmp_path, end):
    (tmp_path / "endless.py").write_text(ENDLESS)
    driver.start("--nproc_per_node=1", str(tmp_path / "endless.py"), lease_s=10.0 if end == "silent" else 600.0)
    processes = pids_of(
        next(message for message in iter(driver.read, {}) if str(message.get("line", "")).startswith("pids"))
    )
    if end == "message":
        driver.send(end=True)
        # A launcher that takes longer than its grace is killed.
        assert driver.until("ended")["ended"]["code"] in (128 + signal.SIGTERM, -signal.SIGKILL)
    elif end == "closed":
        driver.process.stdin.close()
    elif end == "killed":
        driver.process.kill()
        processes.pop(1).kill()  # what a rank started itself has nobody left who would end it
    elif end == "terminated":
        driver.process.terminate()
    else:
        driver.answers_ticks = False
        assert driver.until("ended")["ended"]["code"] != 0
    wait_for_end(processes)


@pytest.mark.slow
def test_nobody_who_reads_holds_up_the_end_of_the_lease(driver, tmp_path):
    (tmp_path / "loud.py").write_text(f"{ENDLESS.rpartition('while')[0]}\nwhile True: print('x' * 1000)\n")
    driver.start("--nproc_per_node=1", str(tmp_path / "loud.py"), lease_s=10.0)
    processes = pids_of(
        next(message for message in iter(driver.read, {}) if str(message.get("line", "")).startswith("pids"))
    )
    wait_for_end(processes)  # no message is read from here on


def test_an_order_that_was_on_its_way_longer_than_the_lease_starts_nothing(driver, tmp_path):
    driver.ready()
    order = {"arguments": [str(tmp_path / "none.py")], "environment": {}, "lease_s": 10.0, "tock": driver.tick - 10.5}
    driver.send(start=order)
    assert driver.read() == {}
    assert driver.process.wait(DEADLINE_S) == 0


def test_a_lease_is_counted_from_the_tick_that_came_back_and_never_goes_back():
    reading, writing = os.pipe()
    told, telling = os.pipe()
    agent = Agent(reading, Sender(telling))
    now = time.monotonic()
    for tock in (now + 5.0, now + 3.0):
        os.write(writing, json.dumps({"tock": tock}).encode() + b"\n")
        agent._read()
    assert agent._leased_at == now + 5.0
    for descriptor in (reading, writing, told, telling):
        os.close(descriptor)
