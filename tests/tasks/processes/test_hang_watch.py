"""A program whose steps stop: its stacks are kept once, it is told once, and neither while it says that it is busy."""

from __future__ import annotations

import sys

import pytest

from tasks.processes.hang_watch import HangWatch
from tasks.processes.process import run_command

# It stops after some steps, and goes on once the test has seen that.
PROGRAM = """
import sys, threading, time
from pathlib import Path
from base.progress import busy, print_progress
from cherry.watch.rank_log import log_to_file

folder, works = Path(sys.argv[1]), sys.argv[2] == "busy"
log_to_file(str(folder), 0, prints=True)

def waits_for_the_other_rank():
    while not (folder / "go-on").exists():
        threading.Event().wait(0.05)

for step in range(5):
    print_progress(f"step {step}", step / 10)
    threading.Event().wait(0.02)
if works:
    with busy("evaluation"):
        threading.Event().wait(4.0)
else:
    waits_for_the_other_rank()
print_progress("the last step", 1.0)
"""


@pytest.fixture
def hang(tmp_path):
    """Runs the program under a watch; what was said, and the files of stacks."""

    def run(kind):
        said, lines = [], []
        folder = tmp_path / "train"

        def say(line):
            said.append(line)
            (tmp_path / "go-on").touch()

        watch = HangWatch(folder, 2, 2.0, say)
        command = [sys.executable, "-c", PROGRAM, str(tmp_path), kind]
        run_command(command, name="program", on_line=lines.append, beside=watch.over)
        assert lines[-1] == "the last step"
        return said, sorted((folder / "stacks").glob("*"))

    return run


def test_the_stacks_of_steps_that_stopped_are_kept_and_the_program_goes_on(hang):
    (said,), (kept,) = hang("stuck")
    assert said.startswith("training may hang: no step for ") and str(kept) in said
    first, second = kept.read_text().split("===== ")[1:]
    assert first.startswith("rank 0 ") and "in waits_for_the_other_rank" in first
    assert second.startswith("rank 1 =====\nno stack came")  # there is no such rank


def test_an_evaluation_that_takes_longer_than_steps_is_no_hang(hang):
    assert hang("busy") == ([], [])
