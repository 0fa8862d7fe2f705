"""A whole job that is killed outright in the middle of a save goes on from the checkpoint before it, exactly."""

import os
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from cherry.checkpoint.naming import newest_checkpoint
from tests.processes import kill_all, tree

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
_DEADLINE_S = 240.0


def kill_in_the_save(job, sign, place, signs):
    """Run until step 8's save is stuck at `place` on `signs` ranks and all steps are done; kill everything.

    Returns:
        What it said.
    """
    command = job.command(ranks=2)
    command[command.index("train.py")] = "tests/chaos/stuck_save.py"
    told = {"STUCK_PLACE": place, "STUCK_STEP": "8", "STUCK_SIGN": str(sign)}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **told}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, text=True, **pipes)
    deadline = time.monotonic() + _DEADLINE_S
    while len(list(sign.parent.glob(f"{sign.name}-*"))) < signs or len(job.metrics) < 12:
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline, "the save was not reached"
        time.sleep(0.05)
    family = tree(process.pid)
    kill_all(family)
    output, _ = process.communicate()
    psutil.wait_procs(family[1:], timeout=_DEADLINE_S)
    return output


def test_the_checkpoint_before_is_resumed(make_job, tmp_path):
    whole, job = make_job("unbroken"), make_job("killed")
    assert whole.run(ranks=2).returncode == 0
    newest = str(job.checkpoint(4).parent)
    # The run that goes on after the first kill is the one that is killed next.
    for resumed, (place, signs) in enumerate((("write", 2), ("commit", 1))):
        output = kill_in_the_save(job, tmp_path / f"stuck-{place}", place, signs)
        assert ("step_4: 4 steps" in output) == bool(resumed)
        assert job.losses == whole.losses, "training went on while the save was stuck"
        assert list(job.checkpoint(8).glob("*.distcp")), "the save had begun"
        assert not (job.checkpoint(8) / "COMMITTED").exists()
        assert newest_checkpoint(newest) == str(job.checkpoint(4))
    again = job.run(ranks=2)
    assert again.returncode == 0, again.stderr
    assert "step_4: 4 steps" in again.stdout
    assert job.losses == whole.losses
    assert newest_checkpoint(newest) == str(job.checkpoint(12))
