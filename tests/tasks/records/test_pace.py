"""The warning about training that is far slower than planned, on the figures of a real one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from statistics import median
from typing import Any

import pytest

from tasks.overrides import resolve
from tasks.records.pace import Pace


@pytest.fixture
def trained(make_job: Any) -> Any:
    """A directory with the metrics of 30 steps."""
    job = make_job("trained")
    done = job.run("--set", "train.steps=30")
    assert done.returncode == 0, done.stdout + done.stderr
    return job


def paced(trained: Any, directory: Path, planned_s: float | None) -> list[str]:
    """Warnings as the steps' lines arrive one by one."""
    config = resolve("configs/tiny.yaml", {"runs_directory": str(directory.parent), "name": directory.name})
    folder = directory / "train"
    folder.mkdir(parents=True, exist_ok=True)
    pace, found = Pace(config, folder, planned_s), list[str]()
    for line in (trained.directory / "train" / "metrics.jsonl").read_text().splitlines():
        with (folder / "metrics.jsonl").open("a") as handle:
            handle.write(line + "\n")
        if (warning := pace.warning()) is not None:
            found.append(warning)
    return found


def test_training_that_is_slower_than_three_times_its_plan_is_warned_of_once(
    trained: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    seconds = [one["step_seconds"] for one in trained.metrics]
    fast, slow = min(seconds), max(seconds)
    first = median(seconds[5:15])

    assert paced(trained, tmp_path / "as-planned", slow / 2.9) == []
    assert paced(trained, tmp_path / "without-a-plan", None) == []

    planned = fast / 3.1
    (warning,) = paced(trained, tmp_path / "slow", planned)
    assert warning.startswith(f"a step takes {first:.3g} s, {first / planned:.1f} times the plan's {planned:.3g} s")
    for cause in ("other programs on the CPU", "a rank has 2", "train.threads_per_rank=1"):
        assert cause in warning
    told = json.loads((tmp_path / "slow" / "train" / "slow.json").read_text())
    assert told == {"step_seconds": first, "predicted_step_seconds": planned}

    assert paced(trained, tmp_path / "slow", planned) == []  # another attempt at the same training
    shutil.move(tmp_path / "slow" / "train", tmp_path / "slow" / "train.aside")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    (warning,) = paced(trained, tmp_path / "slow", planned)  # another training
    assert "other programs" in warning
    assert "threads" not in warning
