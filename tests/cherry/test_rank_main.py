"""One rank's program: what an error of torch counts as, and the debuggers that it works with."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from base.errors import (
    ConfigError,
    InvalidInputError,
    MissingFileError,
    WorkerLostError,
    is_retryable_exit_code,
)
from cherry.rank_main import build_parser, classify_error, resolve

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried 2 GiB."), InvalidInputError, "gradient_accumulation_steps"),
        (dist.DistNetworkError("Connection closed by peer"), WorkerLostError, "connection to another rank broke"),
        (RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:534] reset"), WorkerLostError, "connection"),
        (torch.AcceleratorError("CUDA error: an illegal memory access was encountered"), WorkerLostError, "GPU failed"),
    ],
)
def test_an_error_of_torch_is_classified(error: RuntimeError, kind: type[Exception], words: str) -> None:
    classified = classify_error(error)
    assert type(classified) is kind and words in str(classified)
    assert is_retryable_exit_code(classified.exit_code) == (kind is WorkerLostError)


def test_a_bug_stays_what_it_is() -> None:
    bug = RuntimeError("shape '[2]' is invalid for input of size 3")
    assert classify_error(bug) is bug


def debug(job: Any, environment: dict[str, str], program: list[str], commands: str) -> subprocess.CompletedProcess[str]:
    """Run train.py alone, with commands for the debugger on its standard input."""
    command = [sys.executable, *program, "--config", str(job.config), "--run_dir", str(job.directory)]
    return subprocess.run(
        command, cwd=ROOT, env=environment, input=commands, capture_output=True, text=True, check=False
    )


def test_pdb_opens_where_an_error_was_raised(make_job: Any, environment: dict[str, str]) -> None:
    job = make_job("missing")
    flags = ["train.py", "--pdb", "--resume_from=nowhere/step_5"]
    ended = debug(job, environment, flags, "p 'frame of', wanted\nq\n")
    assert "('frame of', 'nowhere/step_5')" in ended.stdout, ended.stdout + ended.stderr
    assert ended.returncode == 12 and "error: nowhere/step_5 holds no finished checkpoint" in ended.stderr


def test_a_program_under_pdb_comes_to_its_end_in_the_debugger(make_job: Any, environment: dict[str, str]) -> None:
    job = make_job("whole")
    flags = ["-m", "pdb", "train.py", "--pdb", "--steps=3"]
    ended = debug(job, environment, flags, "continue\np 'still', 'here'\nq\n")
    assert "The program exited via sys.exit(). Exit status: 0" in ended.stdout, ended.stdout + ended.stderr
    assert "('still', 'here')" in ended.stdout
    assert len(job.losses) == 3


def test_pdb_with_several_ranks_is_refused(make_job: Any) -> None:
    ended = make_job("ranks").run("--pdb", ranks=2)
    assert ended.returncode == 11
    assert "--pdb needs a single rank, got 2" in ended.stderr


def options(*flags):
    return build_parser().parse_args(flags)


def test_with_only_a_model_path_shape_and_tokenizer_come_from_its_folder(released_weights, mini):
    folder, _ = released_weights
    job = resolve(options(f"--model_path={folder}", "--batch_size=24", "--learning_rate=1e-5"))
    assert job.model.model_copy(update={"preset": "tiny"}) == mini().model.model_copy(
        update={"initializer_range": 0.02}
    )
    assert (job.init_from, job.data.tokenizer) == (str(folder), f"{folder}/tokenizer.json")
    assert (job.train.batch_size, job.train.learning_rate) == (24, 1e-5)


def test_a_pt_file_has_its_config_beside_it(released_weights, monkeypatch, tmp_path):
    folder, _ = released_weights
    monkeypatch.chdir(folder)
    assert resolve(options("--model_path=671b_model.pt")).init_from == "671b_model.pt"
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MissingFileError, match=r"\./config\.json does not exist"):
        resolve(options("--model_path=671b_model.pt"))


def test_flags_that_break_rules_are_all_told_at_once(job_config):
    with pytest.raises(ConfigError) as caught:
        resolve(options(f"--config={job_config}", "--batch_size=7", "--gradient_accumulation_steps=2", "--steps=1"))
    assert "train.batch_size: must be divisible by" in str(caught.value)
    assert "train.warmup_steps: must be below train.steps (1)" in str(caught.value)
    with pytest.raises(ConfigError, match="needs --config, or --model_path"):
        resolve(options())
