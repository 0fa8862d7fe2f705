"""Which program starts the job of `cherry-launch --cluster`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
LAUNCH = "from cherry_main import cherry_launch; cherry_launch()"


@pytest.mark.parametrize(
    ("spec", "told"),
    [
        ("provider: slurm\nnodes: 2\n", "no squeue on this machine"),
        ("provider: sky\nnodes: 2\n", "no run submits to provider sky"),
        ("gpu: H100\nnodes: 2\n", "names no hosts to start on"),
        ("nodes: [{host: node1}]\n", "--nnodes must be from 1 to 1, the cluster's nodes (got 2)"),
    ],
)
def test_the_cluster_file_decides(spec, told, tmp_path):
    (tmp_path / "cluster.yaml").write_text(spec)
    command = [sys.executable, "-c", LAUNCH, f"--cluster={tmp_path}/cluster.yaml", "--nnodes=2", "train.py"]
    environment = {**os.environ, "PATH": str(tmp_path), "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(
        [*command, "--run_dir", str(tmp_path / "run")], capture_output=True, text=True, env=environment, check=False
    )
    assert ended.returncode == 11, ended.stderr
    assert told in ended.stderr
