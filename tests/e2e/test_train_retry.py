"""A rank that is killed: the train task is tried again and ends as if nothing had happened."""

import os
import signal

import pytest

from tests.processes import every

pytestmark = pytest.mark.slow


def ranks(project, name):
    """Pids of the ranks that work on a run."""
    found = []
    for process in every("cmdline"):
        line = process.info["cmdline"] or []
        if str(project.runs / name) in line and "cherry.launcher" not in line and line[-1] != "--version":
            found.append(process.pid)
    return found


def test_a_killed_rank_costs_nothing_but_time(project, finished):
    running = project.start("flows.cli", "run", project.config, "name=killed", log="killed")
    marker = project.runs / "killed" / "train" / "checkpoints" / "step_10" / "COMMITTED"
    project.wait_for(marker.exists, "a committed checkpoint")
    victims = ranks(project, "killed")
    assert len(victims) == 2
    os.kill(victims[-1], signal.SIGKILL)
    steps_before = len(project.metrics("killed"))
    assert running.wait() == 0, (project.home / "killed.log").read_text()[-4000:]

    launcher = (project.runs / "killed" / "train" / "launcher.log").read_text()
    assert "killed by SIGKILL" in launcher
    assert "resumed from" in launcher
    assert 10 <= steps_before < 60
    broken, whole = project.metrics("killed"), project.metrics("first")
    assert [line["step"] for line in broken] == list(range(1, 61))
    for key in ("loss", "grad_norm", "mtp_loss", "expert_load_max_over_mean"):
        assert [line[key] for line in broken] == [line[key] for line in whole]

    run = project.mlflow_runs("killed")["train"]
    assert (run.info.run_id, run.info.status) == (project.step("killed", "train")["run_id"], "FINISHED")
    history = project.mlflow.get_metric_history(run.info.run_id, "train/loss")
    assert [(point.step, point.value) for point in history] == [(line["step"], line["loss"]) for line in whole]
