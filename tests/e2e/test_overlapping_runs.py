"""Two runs that overlap in their evaluation: the last to end is compared with what the other has made champion."""

import json

import pytest

from tasks.tracking.mlflow_database import alone

pytestmark = pytest.mark.slow


def read(path):
    return path.read_text() if path.exists() else ""


def test_a_run_that_was_compared_before_a_better_one_became_champion_does_not_replace_it(project, finished):
    client, (better,) = project.mlflow, project.versions("first")
    client.delete_registered_model_alias("pipeline", "champion")  # as when both runs began
    running = project.start("flows.cli", "run", project.config, "name=late", "train.learning_rate=1e-3", log="late")
    evaluated = project.runs / "late" / "steps" / "evaluate.json"
    try:
        project.wait_for(lambda: '"evaluate"' in read(project.runs / "late" / "events.jsonl"), "the evaluation's begin")
        with alone(project.runs / "mlflow.db"):  # what changes an alias waits for this
            project.wait_for(evaluated.exists, "the evaluation's end")
            first_verdict = json.loads((project.runs / "late" / "evaluate" / "evaluation.json").read_text())
            client.set_registered_model_alias("pipeline", "champion", better.version)
        assert running.wait() == 0, (project.home / "late.log").read_text()[-4000:]
        assert client.get_model_version_by_alias("pipeline", "champion").version == better.version
    finally:
        client.set_registered_model_alias("pipeline", "champion", better.version)
    assert (first_verdict["verdict"], first_verdict["baseline"]) == ("better", "untrained")
    summary = json.loads((project.runs / "late" / "summary.json").read_text())
    assert (summary["verdict"], summary["compared_with"]) == ("worse", f"pipeline v{better.version}")
    assert summary["heldout_loss"] > finished["heldout_loss"]
    (late,) = project.versions("late")
    assert (late.tags["verdict"], late.tags["compared_with"]) == ("worse", f"pipeline v{better.version}")
    assert client.get_model_version_by_alias("pipeline", "candidate").version == late.version
