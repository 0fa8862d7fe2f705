"""Fixtures of tests with several ranks: many small training jobs in one start of the processes."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

PROGRAM = Path(__file__).with_name("train_jobs.py")


@pytest.fixture(scope="session")
def train_jobs(
    new_job: Callable[[Path], Any],
    run_together: Callable[[list[list[str]]], None],
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[list[Any]], dict[str, Any]]:
    """Trains jobs in order; their `Job`s by name. See `Wanted` in test_layouts.py for what a job is."""

    def train(wanted: list[Any]) -> dict[str, Any]:
        folder = tmp_path_factory.mktemp("ranks")
        jobs = {job.name: new_job(folder / str(number)) for number, job in enumerate(wanted)}
        lines = []
        for job in wanted:
            line = {**asdict(job), "set": job.flags, "config": str(jobs[job.name].config)}
            source = str(jobs[job.resume_from[0]].checkpoint(job.resume_from[1])) if job.resume_from else None
            lines.append({**line, "directory": str(jobs[job.name].directory), "resume_from": source})
        (folder / "jobs.json").write_text(json.dumps(lines))
        ranks = max(job.ranks for job in wanted)
        commands = [[sys.executable, str(PROGRAM), str(folder), str(rank)] for rank in range(ranks)]
        run_together(commands)
        return jobs

    return train
