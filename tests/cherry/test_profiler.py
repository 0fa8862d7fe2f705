"""Profiles: the chosen steps and ranks are recorded, whole, and nothing else is."""

from __future__ import annotations

import gzip
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from base.config import validate
from base.errors import ConfigError
from cherry.job_config import JobConfig


def read(path: Path) -> Any:
    with gzip.open(path, "rt") as file:
        return json.load(file)


def test_the_chosen_steps_of_the_chosen_rank_are_in_a_chrome_trace(
    make_job: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    job = make_job("profiled")
    wanted = ["--set", "train.profile.steps=[3,4]", "--set", "train.profile.ranks=[1]"]
    ended = job.run("--steps=6", *wanted, "--set", "train.profile.memory=true", ranks=2)
    assert ended.returncode == 0, ended.stderr
    folder = job.directory / "train" / "profile"
    name = "rank-1-steps-3-4"
    assert sorted(path.name for path in folder.iterdir()) == [f"{name}.memory.json.gz", f"{name}.trace.json.gz"]
    events = read(folder / f"{name}.trace.json.gz")["traceEvents"]
    names = {event.get("name") for event in events}
    assert {"step 3", "step 4"} <= names and not {"step 2", "step 5"} & names
    assert {"aten::mm", "aten::logsumexp", "gloo:all_reduce"} <= names, "forward, loss and collectives"
    # Of the range's operators each lies inside one of the steps, which do not overlap.
    spans = sorted((e["ts"], e["ts"] + e["dur"]) for e in events if e.get("name") in ("step 3", "step 4"))
    assert spans[0][1] <= spans[-1][0]
    memory = read(folder / f"{name}.memory.json.gz")
    assert [row["time_us"] for row in memory] == sorted(row["time_us"] for row in memory)
    assert min(row["bytes"] for row in memory) < 0 < max(row["bytes"] for row in memory)
    assert "profile of steps 3 to 4 is in" in (job.directory / "train" / "rank-1.log").read_text()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU and finds none")
def test_a_gpu_s_trace_has_its_kernels_and_a_memory_snapshot_the_stacks(make_job: Any) -> None:
    job = make_job("gpu")
    ended = job.run("--steps=4", "--set", "train.profile={steps: [2, 3], memory: true}")
    assert ended.returncode == 0, ended.stderr
    folder = job.directory / "train" / "profile"
    events = read(folder / "rank-0-steps-2-3.trace.json.gz")["traceEvents"]
    assert [event for event in events if event.get("cat") == "kernel"]
    # Written by this very test's run: unpickling it is safe.
    snapshot = pickle.loads((folder / "rank-0-steps-2-3.memory.pickle").read_bytes())
    entries = [entry for trace in snapshot["device_traces"] for entry in trace]
    files = {frame["filename"].rpartition("/")[2] for entry in entries for frame in entry["frames"]}
    assert {"alloc", "free_completed"} <= {entry["action"] for entry in entries}
    assert "trainer.py" in files


def test_a_run_that_ends_inside_the_range_keeps_what_it_recorded(make_job: Any) -> None:
    job = make_job("diverged")
    flags = ["--learning_rate=1e30", "--set", "train.on_divergence=stop", "--set", "train.max_skipped_steps=2"]
    ended = job.run(*flags, "--set", "train.profile.steps=[2,12]")
    assert ended.returncode == 16, ended.stderr
    (trace,) = (job.directory / "train" / "profile").iterdir()
    last = job.metrics[-1]["step"]
    assert trace.name == f"rank-0-steps-2-{last}.trace.json.gz"
    names = {event.get("name") for event in read(trace)["traceEvents"]}
    assert {f"step {step}" for step in range(2, last + 1)} <= names


@pytest.mark.parametrize(
    ("profile", "key", "rule"),
    [
        ({"steps": [4, 3]}, "train.profile.steps", "first <= last"),
        ({"steps": [4, 13]}, "train.profile.steps", r"train\.steps \(12\)"),
        ({"steps": [0, 3]}, "train.profile.steps", "greater than 0"),
        ({"steps": [1, 2], "ranks": []}, "train.profile.ranks", "at least one rank"),
        ({"steps": [1, 2], "ranks": [0, 1]}, "train.profile.ranks", "number of ranks"),
        ({"step": 1}, "train.profile", "steps"),
    ],
)
def test_a_range_that_names_nothing_is_refused(mini: Any, profile: dict[str, Any], key: str, rule: str) -> None:
    raw = mini().model_dump(mode="json", exclude={"model": {"preset"}})
    raw["train"]["profile"] = profile
    with pytest.raises(ConfigError, match=rf"{key}.*{rule}"):
        validate(raw, JobConfig, origin="test")
