"""A release as a tracked run: what a failed one leaves, one at a time, and its record."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prefect.logging import disable_run_logger

from base.errors import OperationalError, ServiceError
from flows.runs.status import read_runs
from tasks.deploy import releasing
from tasks.overrides import resolve
from tasks.release.choice import Release
from tasks.steps import RunContext, find_finished

RELEASE = Release("net", 2, "/weights", story="net v2, judged better than net v1", replaces="net v1")


@pytest.fixture
def context(tmp_path: Path) -> Iterator[RunContext]:
    overrides = {"name": "net", "runs_directory": str(tmp_path), "tracking": {"uri": "json:"}}
    with disable_run_logger():
        yield RunContext(str(tmp_path / "net"), resolve("configs/tiny.yaml", overrides))


def tracked(context: RunContext) -> dict[str, dict[str, Any]]:
    """Tracked runs by name."""
    folder = Path(context.config.runs_directory) / "tracking" / "runs"
    runs = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    return {run["name"]: run for run in runs}


def events(context: RunContext) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (context.path / "events.jsonl").read_text().splitlines()]


def test_a_release_that_fails_is_a_failed_run_with_its_reason(context: RunContext) -> None:
    with pytest.raises(ServiceError), releasing(context, RELEASE) as (opened, release):
        assert (opened.parent_run_id, release.run_id) != (None, None)
        assert {name: run["status"] for name, run in tracked(context).items()} == {
            "net": "RUNNING",
            "net-deploy": "RUNNING",
        }
        raise ServiceError("4 of 4 requests failed")
    runs = tracked(context)
    assert {name: run["status"] for name, run in runs.items()} == {"net": "FAILED", "net-deploy": "FAILED"}
    assert "4 of 4 requests failed" in runs["net-deploy"]["note"]
    assert [event["event"] for event in events(context)] == ["started", "progress", "progress", "failed"]
    assert events(context)[-1]["line"] == "4 of 4 requests failed"
    assert find_finished(context.path, "deploy") is None


def test_what_is_served_and_replaced_is_told_first(context: RunContext) -> None:
    with releasing(context, RELEASE) as (opened, _):
        (opened.path / "deploy.json").write_text("{}")
    told = [event["line"] for event in events(context) if event.get("lasting")]
    assert told == ["net v2, judged better than net v1", "replaces net v1"]
    record = find_finished(context.path, "deploy")
    assert record is not None
    assert record.outputs == {"deploy": str(context.path / "deploy.json")}
    assert {name: run["status"] for name, run in tracked(context).items()} == {
        "net": "FINISHED",
        "net-deploy": "FINISHED",
    }
    assert "seconds/deploy" in tracked(context)["net"]["metrics"]
    assert [run.name for run in read_runs(Path(context.config.runs_directory))] == ["net"]


def test_of_two_releases_at_once_the_second_is_refused_and_leaves_nothing(context: RunContext) -> None:
    other = RunContext(str(context.path.parent / "other"), context.config)
    with releasing(context, RELEASE) as (opened, _):
        with (
            pytest.raises(OperationalError, match=r"another release is under way in .*serving"),
            releasing(other, RELEASE),
        ):
            pass
        (opened.path / "deploy.json").write_text("{}")
    assert not other.path.exists()
    with releasing(other, RELEASE) as (opened, _):
        (opened.path / "deploy.json").write_text("{}")


def test_each_attempt_of_a_release_is_a_run_of_its_own(context: RunContext) -> None:
    for began in (1.0, 2.0):
        attempt = RunContext(context.directory, context.config, began=began)
        with pytest.raises(ServiceError), releasing(attempt, RELEASE):
            raise ServiceError(f"attempt {began:g}")
    folder = Path(context.config.runs_directory) / "tracking" / "runs"
    notes = [json.loads(path.read_text()).get("note") for path in sorted(folder.glob("*.json"))]
    assert sum("attempt" in (note or "") for note in notes) == 2
