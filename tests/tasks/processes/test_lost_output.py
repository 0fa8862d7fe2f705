"""A process whose output nobody reads any more: it goes on, with prints, log lines and Prefect's rich console."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
PROGRAM = """
import logging, os, sys
from prefect.logging.handlers import PrefectConsoleHandler
from tasks.processes.lost_output import outlive_readers
log = logging.getLogger("flow")
log.addHandler(PrefectConsoleHandler())
log.addHandler(logging.StreamHandler())
if sys.argv[2] == "lasting":
    outlive_readers()
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
