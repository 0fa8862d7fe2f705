"""What is left when processes are killed outright: no process, and a run that goes on as if nothing had happened."""

import signal
import time
from collections.abc import Callable

import psutil
import pytest

from tests.processes import every

pytestmark = pytest.mark.slow
_DEADLINE_S = 240.0


def until(condition: Callable[[], bool], what: str) -> None:
    """Poll until something holds."""
    deadline = time.monotonic() + _DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, f"not in {_DEADLINE_S} s: {what}"
        time.sleep(0.05)


def ranks_of(job) -> list[psutil.Process]:
    """The live processes of train.py that work on the job."""
    found = []
    for process in every("cmdline"):
        line = process.info["cmdline"] or []
        if str(job.directory) in line and "train.py" in line and "cherry.launcher" not in line:
            found.append(process)
    return found


def test_a_killed_rank_ends_the_job_with_its_code_and_the_same_command_goes_on_exactly(make_job):
    # At a constant rate the number of steps changes no step, so that the kill may come at any time.
    constant = ("--set", "train.schedule=constant")
    job = make_job("killed")
    process = job.start("--steps=100000", *constant, ranks=2)
    until(lambda: any(job.checkpoint(4).parent.glob("*/COMMITTED")), "a checkpoint is committed")
    ranks_of(job)[0].send_signal(signal.SIGKILL)
    output, _ = process.communicate(timeout=_DEADLINE_S)
    assert process.returncode == 34, output
    assert "was killed by SIGKILL" in output
    assert not ranks_of(job)
    steps = f"--steps={len(job.losses) + 6}"
    ended = job.run(steps, *constant, ranks=2)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "resumed from" in ended.stdout
    whole = make_job("whole")
    assert whole.run(steps, *constant, ranks=2).returncode == 0
    assert job.losses == whole.losses


def test_a_launcher_that_is_killed_leaves_no_rank_behind(make_job):
    job = make_job("orphans")
    process = job.start("--steps=100000", ranks=2)
    until(lambda: len(job.metrics) > 0, "the first step is logged")
    assert len(ranks_of(job)) == 2
    process.kill()
    process.communicate(timeout=_DEADLINE_S)
    until(lambda: not ranks_of(job), "no rank is left")


def test_sigterm_ends_every_rank(make_job):
    job = make_job("terminated")
    process = job.start("--steps=100000", ranks=2)
    until(lambda: len(job.metrics) > 0, "the first step is logged")
    process.terminate()
    process.communicate(timeout=_DEADLINE_S)
    assert process.returncode != 0
    until(lambda: not ranks_of(job), "no rank is left")
