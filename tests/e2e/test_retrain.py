"""The weekly retraining: under the day's name, and otherwise the training flow."""

import json
import re
import shutil
from datetime import UTC, datetime, timedelta

import pytest

pytestmark = pytest.mark.slow


def test_a_retraining_has_the_day_in_its_name_and_goes_on_where_that_day_began(project, finished):
    # The day is that of the run's scheduled start, in UTC: today, or tomorrow when midnight comes in between.
    now = datetime.now(UTC)
    days = [f"first-{day:%Y%m%d}" for day in (now, now + timedelta(days=1))]
    for day in days:
        # As an attempt of the same day left it, whose steps are found: only the order and the name are new here.
        shutil.copytree(project.runs / "first", project.runs / day)
        (project.runs / day / "run_key").unlink()
        (project.runs / day / "summary.json").unlink()
    run = project.run_deployment("retrain-flow/retrain-weekly")
    assert project.end_of(run) == "COMPLETED", (project.home / "worker.log").read_text()[-4000:]
    assert re.fullmatch(r"retrain mini-\d{8}", project.api(f"flow_runs/{run}")["name"])
    (day,) = [day for day in days if (project.runs / day / "summary.json").exists()]
    summary = json.loads((project.runs / day / "summary.json").read_text())
    assert summary["name"] == day
    assert summary["heldout_bits_per_byte"] == finished["heldout_bits_per_byte"]
    assert project.mlflow_runs(day)["flow"].info.status == "FINISHED"
