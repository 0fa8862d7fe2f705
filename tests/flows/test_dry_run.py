"""`cherry run --dry-run`: every step with what would happen to it and why, and nothing is written."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from prefect.logging import disable_run_logger
from rich.console import Console

from base.errors import MissingFileError
from flows.dry_run import forecast, show_steps
from tasks.overrides import resolve
from tasks.run_config import RunConfig

STEPS = ["provision", "data", "train", "export", "quantize", "evaluate", "register"]


def config_in(folder: Path, **more: object) -> RunConfig:
    (folder / "text").mkdir(exist_ok=True)
    (folder / "text" / "a.txt").write_text("words " * 50)
    given = {"runs_directory": str(folder / "runs"), "data": {"source": str(folder / "text")}}
    return resolve("configs/tiny.yaml", {**given, **more})


def test_a_new_run_would_run_every_step_and_nothing_is_written(tmp_path: Path) -> None:
    console = Console(file=(text := io.StringIO()), width=400)
    with disable_run_logger():
        show_steps(console, config_in(tmp_path))
    lines = text.getvalue().splitlines()
    assert [line.split()[:2] for line in lines[1:8]] == [[step, "runs"] for step in STEPS]
    assert "not run yet" in lines[1]
    assert lines[-1].startswith("plan: ")
    assert not (tmp_path / "runs").exists()


def test_what_is_missing_is_refused_as_the_run_would(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match="nowhere"):
        show_steps(Console(file=io.StringIO()), config_in(tmp_path, data={"source": str(tmp_path / "nowhere")}))
    assert not (tmp_path / "runs").exists()


def test_the_forecast_is_of_every_step_in_order(tmp_path: Path) -> None:
    with disable_run_logger():
        assert [step.step for step in forecast(config_in(tmp_path))] == STEPS
