"""The sbatch script: its text, and what cannot be written in one."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from base.config import validate
from base.errors import ConfigError
from cherry.cluster import ClusterSpec
from cherry.remote.job import Job
from cherry.slurm.script import SlurmJob, render

GOLDEN = Path(__file__).parent / "job.sbatch"
SPEC = {
    "provider": "slurm",
    "nodes": 4,
    "gpus_per_node": 8,
    "communication": {"interface": "ib0", "environment": {"NCCL_IB_HCA": "mlx5"}},
    "slurm": {
        "partition": "gpu",
        "account": "llm",
        "qos": "high",
        "time": "1-00:00:00",
        "warning_s": 300,
        "requeues": 7,
        "exclude": ["gpu7", "gpu[10-12]"],
        "options": ["--constraint=h100"],
        "setup": ["module load cuda/13"],
        "python": "/opt/cherry/bin/python",
    },
}


def job(directory="/shared/runs/mine", spec=None, program=("train.py", "--set", "name='a b'", "--run_dir", "r")):
    read = validate(SPEC if spec is None else spec, ClusterSpec, origin="slurm.yaml")
    return SlurmJob(Job(read, 2, 8, tuple(program)), "mine-1a2b3c4d", Path(directory))


def test_a_script_has_every_option_and_is_one_that_bash_reads():
    text = render(job(), working_directory="/shared/cherry")
    assert text == GOLDEN.read_text()
    checked = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True, check=False)
    assert (checked.returncode, checked.stderr) == (0, "")


def test_what_is_not_set_is_left_to_slurm():
    lines = render(job(spec={"provider": "slurm", "slurm": {"exclusive": False}}), working_directory="/w").splitlines()
    assert [line.partition(" ")[2] for line in lines if line.startswith("#SBATCH")] == [
        *("--job-name=mine-1a2b3c4d", "--nodes=2", "--ntasks-per-node=1", "--chdir=/w"),
        *("--output=/shared/runs/mine/train/slurm/%j.out", "--open-mode=append", "--requeue", "--signal=B:USR1@180"),
    ]


@pytest.mark.parametrize("directory", ["/shared/my runs", "/shared/100%", "/shared/a'b"])
def test_a_path_that_sbatch_would_take_apart_is_refused(directory):
    with pytest.raises(ConfigError, match=r"sbatch takes only letters, digits"):
        render(job(directory), working_directory="/w")
