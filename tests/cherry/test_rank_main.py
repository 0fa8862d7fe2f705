"""One rank's program: its flags and environment, what an error of torch counts as, and the debuggers it works with."""

from __future__ import annotations

import json
import os
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


def test_flags_that_break_rules_are_all_reported_at_once(job_config):
    with pytest.raises(ConfigError) as caught:
        resolve(options(f"--config={job_config}", "--batch_size=7", "--gradient_accumulation_steps=2", "--steps=1"))
    assert "train.batch_size: must be divisible by" in str(caught.value)
    assert "train.warmup_steps: must be below train.steps (1)" in str(caught.value)
    with pytest.raises(ConfigError, match="needs --config, or --model_path"):
        resolve(options())


# A rank that writes down what C libraries read from its environment, when it would connect.
LISTENING = """
import ctypes, json, os, sys
import torch.distributed as dist
from cherry import rank_main
def connect(backend, timeout):
    getenv = ctypes.CDLL(None).getenv
    getenv.restype = ctypes.c_char_p
    names = [b"NCCL_BUFFSIZE", b"NCCL_MAX_NCHANNELS", b"NCCL_SOCKET_IFNAME", b"GLOO_SOCKET_IFNAME", b"NCCL_IB_TC"]
    read = {name.decode(): (getenv(name) or b"").decode() for name in names}
    with open(f"{sys.argv.pop()}-{os.environ['RANK']}.json", "w") as handle:
        json.dump({**read, "timeout_s": timeout.total_seconds()}, handle)
    os._exit(0)
dist.init_process_group = connect
rank_main.main(sys.argv[1:-1])
"""


@pytest.mark.slow
def test_settings_reach_the_libraries_of_every_rank_unless_the_environment_has_them(job_config, tmp_path):
    (tmp_path / "listening.py").write_text(LISTENING)
    settings = {"buffer_size": "8MiB", "max_channels": 8, "interface": "lo", "timeout_s": 90.0}
    settings["environment"] = {"NCCL_IB_TC": "106"}
    flags = [flag for key, value in settings.items() for flag in ("--set", f"communication.{key}={json.dumps(value)}")]
    program = [str(tmp_path / "listening.py"), f"--config={job_config}", f"--run_dir={tmp_path}", *flags]
    command = [sys.executable, "-m", "cherry.launcher", "--nproc_per_node=2", *program, str(tmp_path / "read")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "NCCL_MAX_NCHANNELS": "2"}
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    expected = {"NCCL_BUFFSIZE": "8388608", "NCCL_MAX_NCHANNELS": "2", "NCCL_IB_TC": "106", "timeout_s": 90.0}
    expected |= {"NCCL_SOCKET_IFNAME": "lo", "GLOO_SOCKET_IFNAME": "lo"}
    for rank in range(2):
        assert json.loads((tmp_path / f"read-{rank}.json").read_text()) == expected


def test_a_cluster_s_settings_count_where_the_job_leaves_them_out(job_config, monkeypatch):
    monkeypatch.setenv("CHERRY_NETWORK", json.dumps({"interface": "eth1", "timeout_s": 40.0}))
    flags = [f"--config={job_config}", "--set", "communication.timeout_s=20.0"]
    communication = resolve(build_parser().parse_args(flags)).communication
    assert (communication.interface, communication.timeout_s) == ("eth1", 20.0)


@pytest.mark.skipif(Path("/proc/driver/nvidia/gpus").is_dir(), reason="this machine has a GPU")
@pytest.mark.slow
def test_a_backend_that_this_host_s_devices_cannot_use_is_refused(job_config, tmp_path):
    command = [sys.executable, "-m", "cherry.rank_main", f"--config={job_config}", f"--run_dir={tmp_path}"]
    refused = [*command, "--set", "communication.backend=nccl"]
    ended = subprocess.run(refused, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 11, ended.stderr
    assert "communication.backend: nccl cannot be used, as this host has no GPU" in ended.stderr
