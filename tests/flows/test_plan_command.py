"""The plan of a run as tables, JSON and a plot, and an exit code when it does not fit."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from base.errors import ConfigError, DoesNotFitError, MissingFileError

ROOT = Path(__file__).resolve().parents[2]
LARGE = str(ROOT / "configs" / "671b.yaml")
CLUSTER = str(ROOT / "configs" / "clusters" / "h100-256.yaml")


def test_a_plan_is_a_table_or_a_json_document(capsys, code):
    assert code("plan", LARGE, "--cluster", CLUSTER) == 0
    printed = capsys.readouterr().out
    for text in ("finetune-671b on 256 x H100", "optimizer states", "all-to-all across nodes", "MFU, full", "fits"):
        assert text in printed
    assert code("plan", LARGE, "--cluster", CLUSTER, "--json", "--search", "parallel.expert=32") == 0
    made = json.loads(capsys.readouterr().out)
    assert made["fits"]
    assert made["layout"]["parallel.expert"] == 32
    ranks = made["memory"]["busiest ranks"]
    assert ranks["total_bytes"] == sum(ranks["components_bytes"].values()) <= ranks["usable_bytes"]
    step = made["step"]
    assert step["seconds"] == pytest.approx(sum(step["busy_s"].values()) + sum(step["exposed_s"].values()))
    assert len(made["layouts"]) > 10


def test_a_plans_memory_can_be_drawn(tmp_path, capsys, code):
    picture = tmp_path / "plots" / "memory.png"
    assert code("plan", LARGE, "--cluster", CLUSTER, "--plot", str(picture)) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert code("plan", LARGE, "--cluster", CLUSTER, "--plot", "memory.bmp") == ConfigError.exit_code
    assert "--plot: must end with .png, .svg, .pdf (got 'memory.bmp')" in capsys.readouterr().err


def test_a_job_that_does_not_fit_has_an_exit_code_and_shows_what_would(capsys, code):
    assert code("plan", LARGE, "--cluster", CLUSTER, "parallel.expert=1", "--json") == DoesNotFitError.exit_code == 19
    printed = capsys.readouterr()
    assert not json.loads(printed.out)["fits"]
    assert "no room for gathered layers" in printed.err
    told = printed.err.partition("What would fit:\n")[2]
    assert told.startswith("  - parallel.expert=")
    assert "  - parallel.expert=32\n" in told


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--cluster", "nowhere.yaml"], "nowhere.yaml"),
        (["--cluster", CLUSTER, "launch.nnodes=64", "train.gradient_accumulation_steps=1"], "launch.nnodes"),
        (["--cluster", CLUSTER, "parallel.expert=48"], "parallel.expert"),
    ],
)
def test_a_plan_of_what_cannot_be_is_refused(arguments, named, capsys, code):
    assert code("plan", LARGE, *arguments) in (ConfigError.exit_code, MissingFileError.exit_code)
    assert named in capsys.readouterr().err


def test_a_plan_takes_less_than_two_seconds_of_a_processor():
    """Its own time, which other programs on the machine do not lengthen much."""
    command = [sys.executable, "-m", "flows.cli", "plan", LARGE, "--cluster", CLUSTER]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, capture_output=True, cwd=ROOT, env=environment, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2.0
