"""What tests with several ranks share: many small runs for the price of one start."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

Wanted = dict[str, tuple[int, list[str]]]
PROGRAM = Path(__file__).with_name("train_jobs.py")


def run_together(commands: list[list[str]], environment: dict[str, str]) -> None:
    """Run programs side by side; one that fails ends the others, which would wait for it."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    started = [subprocess.Popen(command, text=True, env=environment, **pipes) for command in commands]

    def wait(process: subprocess.Popen[str]) -> str:
        told = process.communicate()[0]
        if process.returncode:
            for other in started:
                other.kill()
        return told

    with ThreadPoolExecutor(len(started)) as pool:
        told = list(pool.map(wait, started))
    assert [process.returncode for process in started] == [0] * len(started), "\n".join(told)


@pytest.fixture
def train_jobs(make_job: Callable[[str], Any], tmp_path: Path) -> Callable[[Wanted], dict[str, Any]]:
    """Trains jobs given as name -> (ranks, overrides), in order; their `Job`s by name."""

    def train(wanted: Wanted) -> dict[str, Any]:
        jobs = {name: make_job(str(number)) for number, name in enumerate(wanted)}
        lines = [
            {"config": str(jobs[name].config), "directory": str(jobs[name].directory), "ranks": ranks, "set": flags}
            for name, (ranks, flags) in wanted.items()
        ]
        (tmp_path / "jobs.json").write_text(json.dumps(lines))
        ranks = max(ranks for ranks, _ in wanted.values())
        commands = [[sys.executable, str(PROGRAM), str(tmp_path), str(rank)] for rank in range(ranks)]
        run_together(commands, next(iter(jobs.values())).environment())
        return jobs

    return train
