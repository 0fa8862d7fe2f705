"""A test session that is killed outright, by itself or through make: what it started is ended."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[2]
TEST = """
import subprocess, sys
def test_that_never_ends():
    child = subprocess.Popen(["sleep", "1000"], start_new_session=True)
    print(f"child {child.pid}", file=sys.__stderr__, flush=True)
    child.wait()
"""


@pytest.mark.slow
@pytest.mark.parametrize("through_make", [False, True])
def test_a_killed_session_leaves_nothing(tmp_path, through_make):
    (tmp_path / "test_one.py").write_text(TEST)
    plugins = "-p tests.conftest -p no:cacheprovider"
    pytest_command = f"{sys.executable} -m pytest -q -s {plugins} {tmp_path} --rootdir {ROOT}"
    (tmp_path / "Makefile").write_text(f"all:\n\t{pytest_command}\n")
    command = ["make", "-C", str(tmp_path)] if through_make else pytest_command.split()
    left_out = ("MAKE", "PYTEST", "CHERRY_TEST")
    environment = {key: value for key, value in os.environ.items() if not key.startswith(left_out)}
    environment |= {"PYTHONPATH": str(ROOT)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with subprocess.Popen(command, cwd=ROOT, env=environment, **pipes) as session:
        assert session.stdout is not None
        line = next(line for line in session.stdout if b"child" in line)
        child = psutil.Process(int(line.split()[-1]))
        session.send_signal(signal.SIGKILL)
        session.wait()
        child.wait(timeout=60)
