"""Silent data corruption on two ranks: a flipped bit is found and named; a spike of the data is not taken for one."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from base.errors import ERROR_FILE_VARIABLE, HardwareError, read_error
from cherry.corruption.recheck import _verdict

ROOT = Path(__file__).parents[3]

PROGRAM = Path(__file__).with_name("corrupted_ranks.py")
CASES = {
    "data": [],
    "activation": [],
    "gradient": [],
    "gradient-fingerprints": ["train.gradient_fingerprints=true"],
    "gradient-fingerprints-inexact": ["train.gradient_fingerprints=true"],
    "self_check": ["train.self_check_every_steps=1"],
}


@pytest.fixture(scope="module")
def found(
    new_job: Callable[[Path], Any],
    run_together: Callable[[list[list[str]]], None],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, list[dict[str, Any]]]:
    """What each rank found, by case; the cases run one after the other in the same processes."""
    folder = tmp_path_factory.mktemp("corrupted")
    jobs = {name: new_job(folder / f"job-{name}") for name in CASES}
    cases = {
        name: {"config": str(job.config), "directory": str(job.directory), "set": CASES[name]}
        for name, job in jobs.items()
    }
    (folder / "cases.json").write_text(json.dumps(cases))
    run_together([[sys.executable, str(PROGRAM), str(folder), str(rank)] for rank in range(2)])
    return {
        name: [{**json.loads((folder / f"{name}-{rank}.json").read_text()), "job": job} for rank in range(2)]
        for name, job in jobs.items()
    }


@pytest.mark.slow
def test_a_spike_that_the_same_inputs_give_again_is_skipped_as_always(found: dict[str, list[dict[str, Any]]]) -> None:
    for outcome in found["data"]:
        assert outcome["error"] is None
        assert (outcome["steps"], outcome["skipped_steps"]) == (4, 2)
    lines = found["data"][0]["job"].metrics
    assert all("skipped" in line and "corruption" not in line for line in lines if line["step"] > 2)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["activation", "gradient-fingerprints", "gradient-fingerprints-inexact"])
def test_a_flipped_bit_is_found_and_its_rank_and_host_are_named(
    found: dict[str, list[dict[str, Any]]], case: str
) -> None:
    host = socket.gethostname()
    for outcome in found[case]:  # on every rank
        assert outcome["exit_code"] == 37
        assert outcome["hosts"] == [host]
        assert f"gave other bits on rank 1 (host {host}): silent data corruption" in outcome["error"]
        assert outcome["error"].startswith("step 3: ")
    last = found[case][0]["job"].metrics[-1]
    assert last["step"] == 3
    assert last["corruption"] == found[case][0]["error"]
    assert not found[case][0]["job"].checkpoint(4).exists()


@pytest.mark.slow
def test_a_backward_pass_without_fingerprints_names_the_hosts_it_can_be_on(
    found: dict[str, list[dict[str, Any]]],
) -> None:
    for outcome in found["gradient"]:
        assert "gradient norm" in outcome["error"]
        assert "in the backward pass of one of 2 ranks" in outcome["error"]
        assert "Set train.gradient_fingerprints" in outcome["error"]
        assert outcome["hosts"] == [socket.gethostname()], "there is one host alone"


@pytest.mark.slow
def test_the_self_check_names_the_rank_whose_bits_changed(found: dict[str, list[dict[str, Any]]]) -> None:
    for outcome in found["self_check"]:
        assert f"gave other bits on rank 1 (host {socket.gethostname()})" in outcome["error"]


def test_the_verdict_names_ranks_by_what_is_their_own_and_else_nobody() -> None:
    assert _verdict([(False, False, "a"), (False, False, "b")], "step 1: x") is None
    named = _verdict([(False, True, "a"), (True, True, "b"), (True, False, "b")], "step 1: x")
    assert named is not None and named.hosts == ("b",)
    assert "rank 1 (host b), rank 2 (host b)" in str(named)
    unknown = _verdict([(False, True, "a"), (False, False, "b")], "step 1: x")
    assert unknown is not None and unknown.hosts == ()
    assert "one of 2 ranks, on a, b" in str(unknown)
    alone = _verdict([(False, True, "a")], "step 1: x")
    assert alone is not None and alone.hosts == ("a",)


# A training program whose rank 1 computes NaN in one place of its third step, once.
WRONG_ONCE = """
import sys
import torch.distributed as dist
from cherry import rank_main, trainer

class WrongOnce(trainer.Trainer):
    def _backward(self, *arguments):
        if dist.get_rank() == 1 and self.progress.step == 2 and not self.spoiled:
            self.spoiled = True
            handle = self.model.norm.register_forward_hook(lambda *a: (handle.remove(), a[2] * float("nan"))[1])
        return super()._backward(*arguments)

    spoiled = False

trainer.Trainer = WrongOnce
rank_main.main(sys.argv[1:])
"""


@pytest.mark.slow
def test_the_launcher_ends_with_a_code_of_its_own_and_hands_the_host_on(
    new_job: Callable[[Path], Any], environment: dict[str, str], tmp_path: Path
) -> None:
    job, program, error_file = new_job(tmp_path / "run"), tmp_path / "wrong_once.py", tmp_path / "error.json"
    program.write_text(WRONG_ONCE)
    flags = ["--config", str(job.config), "--run_dir", str(job.directory)]
    command = [sys.executable, "-m", "cherry.launcher", "--nproc_per_node=2", str(program), *flags]
    ended = subprocess.run(
        command,
        cwd=ROOT,
        env={**environment, ERROR_FILE_VARIABLE: str(error_file)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == HardwareError.exit_code, ended.stdout + ended.stderr
    error = read_error(error_file)
    assert isinstance(error, HardwareError)
    assert error.hosts == (socket.gethostname(),)
    text = job.metrics[-1]["corruption"]
    assert "on rank 1 (host" in text
    assert text in str(error), "whichever rank's error came first"
    assert text in ended.stdout and text in ended.stderr
    assert all(text in (job.directory / "train" / f"rank-{rank}.log").read_text() for rank in range(2))
