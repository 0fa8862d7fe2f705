"""The all-reduce of a preflight: its bandwidths by nccl-tests' definition, and its figures from real ranks."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from base.json_lines import read_lines
from base.progress import PROGRESS_FILE_VARIABLE
from cherry.remote.all_reduce import bandwidths


@pytest.mark.parametrize(("ranks", "factor"), [(1, 0.0), (2, 1.0), (8, 1.75), (16, 1.875)])
def test_bus_bandwidth_is_what_the_busiest_link_carries(ranks, factor):
    """The factors are those of nccl-tests, doc/PERFORMANCE.md."""
    assert bandwidths(1_000_000, 0.001, ranks) == (1e9, factor * 1e9)


@pytest.mark.long
def test_rank_0_reports_a_row_a_size(tmp_path, environment):
    progress = tmp_path / "progress.jsonl"
    command = [sys.executable, "-m", "cherry.launcher", "--nproc_per_node=2", "-m", "cherry.remote.all_reduce"]
    variables = {**environment, PROGRESS_FILE_VARIABLE: str(progress), "CUDA_VISIBLE_DEVICES": ""}
    ended = subprocess.run(command, env={**os.environ, **variables}, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    rows = [row["figures"] for row in read_lines(progress)]
    assert [row["bytes"] for row in rows] == [1 << 16, 1 << 20, 1 << 23]
    for row in rows:
        assert row["ranks"] == 2
        assert row["algorithm_bytes_s"] == row["bus_bytes_s"] == pytest.approx(row["bytes"] / row["seconds"])
