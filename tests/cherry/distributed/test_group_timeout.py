"""Timeout of every process group: what each is configured with, and that a stopped rank breaks each of them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[3]
# A training program whose second step is a hang: rank 1 stops, and rank 0 waits for it in each group in turn.
HANGING = """
import json, os, signal, sys
from pathlib import Path
import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _world
from cherry import rank_main
from cherry.hooks.protocol import TrainerHook

class Hang(TrainerHook):
    def on_step_begin(self, step):
        if step < 2:
            return
        pids = [None, None]
        dist.all_gather_object(pids, os.getpid())
        if dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGSTOP)
        found = []
        for number, group in enumerate(_world.pg_map):
            timeout = group._get_backend(torch.device("cpu")).options._timeout.total_seconds()
            error = None
            try:
                dist.all_reduce(torch.ones(1), group=group)
            except RuntimeError as broken:
                error = str(broken).splitlines()[0]
            found.append({"name": group.group_desc, "size": group.size(), "timeout_s": timeout, "error": error})
        Path(os.environ["FOUND"]).write_text(json.dumps(found))
        os.kill(pids[1], signal.SIGKILL)
        os._exit(0)

rank_main.main(sys.argv[1:], hooks=[Hang()])
"""


@pytest.mark.slow
def test_a_stopped_rank_breaks_every_group_after_the_configured_time(
    make_job: Callable[[str], Any], environment: dict[str, str], tmp_path: Path
) -> None:
    job, program, found = make_job("hanging"), tmp_path / "hanging.py", tmp_path / "found.json"
    program.write_text(HANGING)
    flags = ["--config", str(job.config), "--run_dir", str(job.directory)]
    flags += ["--set", "communication.timeout_s=15", "--set", "parallel.expert=2"]
    command = [sys.executable, "-m", "cherry.launcher", "--nproc_per_node=2", str(program), *flags]
    ended = subprocess.run(
        command, cwd=ROOT, env={**environment, "FOUND": str(found)}, capture_output=True, text=True, check=False
    )
    assert found.exists(), ended.stdout + ended.stderr
    groups = json.loads(found.read_text())
    assert {group["timeout_s"] for group in groups} == {15.0}, groups
    shared = [group for group in groups if group["size"] == 2]
    assert len(shared) == 2, "the default group, which the experts' axis takes, and the checkpoints' own"
    assert any(group["name"].startswith("mesh_") for group in groups), groups
    assert all(group["error"] is not None for group in shared), groups
