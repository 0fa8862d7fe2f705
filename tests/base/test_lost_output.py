"""A process whose output cannot be written: it goes on, with prints, log lines and Prefect's rich console."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import logging, os, sys
from prefect.logging.handlers import PrefectConsoleHandler
from base.lost_output import outlive_output
log = logging.getLogger("flow")
log.addHandler(PrefectConsoleHandler())
log.addHandler(logging.StreamHandler())
if sys.argv[2] == "lasting":
    outlive_output()
print("ready", flush=True)
sys.stdin.readline()
for number in range(3):
    log.warning("line %d", number)
    print("progress", flush=True)
open(sys.argv[1], "w").write("went on")
"""


@pytest.mark.slow
@pytest.mark.parametrize(("how", "went_on"), [("lasting", True), ("as it is", False)])
def test_a_process_outlives_the_reader_of_its_output(tmp_path, how, went_on):
    end = tmp_path / "end"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PREFECT_HOME": str(tmp_path / "prefect")}
    command = [sys.executable, "-c", PROGRAM, str(end), how]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with subprocess.Popen(command, env=environment, **pipes) as process:
        assert process.stdout is not None and process.stdin is not None
        while process.stdout.readline().strip() != b"ready":
            pass
        process.stdout.close()
        process.stdin.write(b"\n")
        process.stdin.close()
        code = process.wait()
    assert (code == 0, end.exists()) == (went_on, went_on)


def test_on_a_full_disk_lines_are_lost_until_there_is_space(tmp_path):
    program = """
import os, sys
from base.lost_output import outlive_output
outlive_output()
for number in range(3):
    print("lost", number, flush=True)
file = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT)
os.dup2(file, 1)
for number in range(2):
    print("there", number, flush=True)
"""
    environment, log = {**os.environ, "PYTHONPATH": str(ROOT)}, tmp_path / "log"
    with open("/dev/full", "wb") as full:
        command = [sys.executable, "-c", program, str(log)]
        ended = subprocess.run(command, env=environment, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert log.read_text() == "\nthere 0\nthere 1\n"
