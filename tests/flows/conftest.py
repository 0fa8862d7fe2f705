"""Run directories as steps leave them, and the `cherry` command called in this process."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from base import storage
from flows.cli import main
from tasks.lifecycle import TRAIN_STEPS
from tasks.records.events import write_event

CONFIG = {"model": {"preset": "tiny"}, "tracking": {"uri": "json:"}}


class MadeRun:
    """One run directory, filled in by the test."""

    def __init__(self, directory: Path, modified: float, **config: Any) -> None:
        self.directory = directory
        (directory / "steps").mkdir(parents=True)
        file = directory / "config.yaml"
        values = {"name": directory.name, "runs_directory": str(directory.parent), **CONFIG, **config}
        file.write_text(json.dumps(values))  # JSON is YAML
        os.utime(file, (modified, modified))

    def finish(self, *steps: str, seconds: float = 2.0) -> MadeRun:
        for step in steps:
            storage.write_json(str(self.directory / "steps" / f"{step}.json"), {"step": step, "seconds": seconds})
            write_event(self.directory, step, "finished", seconds=seconds)
        return self

    def finish_all(self) -> MadeRun:
        return self.finish(*TRAIN_STEPS)

    def fail(self, step: str, **details: Any) -> MadeRun:
        write_event(self.directory, step, "failed", **details)
        return self

    def train(self, *, step: int, steps: int, checkpoints: tuple[int, ...] = (), loss: float = 2.0) -> MadeRun:
        line = {"step": step, "steps": steps, "loss": loss, "seconds_left": 9.0}
        storage.write_bytes(f"{self.directory}/train/metrics.jsonl", f"{json.dumps(line)}\n".encode())
        for number in checkpoints:
            storage.commit(f"{self.directory}/train/checkpoints/step_{number}")
        return self

    def evaluate(self, *, verdict: str = "better", bits: float = 2.5, losses: tuple[float, ...] = ()) -> MadeRun:
        found = {"verdict": verdict, "reason": "a reason", "bits_per_byte": bits, "heldout_loss": bits * 2}
        storage.write_json(f"{self.directory}/evaluate/evaluation.json", found)
        documents = [{"id": str(place), "nll": nll * 100, "tokens": 100} for place, nll in enumerate(losses)]
        storage.write_json(f"{self.directory}/evaluate/nll-candidate.json", {"documents": documents})
        return self.finish("evaluate")

    def register(self, name: str = "small", version: int = 1) -> MadeRun:
        storage.write_json(f"{self.directory}/register.json", {"name": name, "version": version})
        return self.finish("register")

    def hold(self, process: psutil.Process, **details: Any) -> MadeRun:
        lease = {"pid": process.pid, "created": process.create_time(), "token": "t", **details}
        storage.write_json(f"{self.directory}/lease.json", lease)
        return self


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., MadeRun]:
    """Makes run directories in the test's own runs directory, `runs`; each is newer than the one before."""
    made: list[MadeRun] = []

    def make(name: str, **config: Any) -> MadeRun:
        made.append(MadeRun(tmp_path / "runs" / name, time.time() - 1000 + len(made), **config))
        return made[-1]

    return make


def exit_code(*arguments: str) -> object:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    return ended.value.code


@pytest.fixture
def code() -> Callable[..., object]:
    """Exit code of the command with these arguments."""
    return exit_code
