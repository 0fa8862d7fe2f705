"""Prefect artifacts are best effort: left out outside of a run, and an outage of the server is a warning."""

from __future__ import annotations

import pytest
from prefect.settings import PREFECT_API_URL, PREFECT_CLIENT_MAX_RETRIES, temporary_settings

from tasks.artifacts import ProgressArtifact, show_markdown, show_table

# Nothing listens on the discard port.
NOWHERE = "http://127.0.0.1:9/api"


def show_all() -> None:
    show_table("rows", [{"a": 1}], "rows of a run")
    show_markdown("note", "**better**", "a text")
    progress = ProgressArtifact("train", "a bar")
    for fraction in (0.01, 0.5, 1.0):
        progress.reached(fraction)


def test_outside_of_a_run_no_server_is_asked(caplog: pytest.LogCaptureFixture) -> None:
    with temporary_settings({PREFECT_API_URL: NOWHERE}):
        show_all()
    assert caplog.text == ""


def test_a_server_that_does_not_answer_costs_the_artifacts_and_no_step(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tasks.artifacts.in_prefect_run", lambda: True)
    with temporary_settings({PREFECT_API_URL: NOWHERE, PREFECT_CLIENT_MAX_RETRIES: 0}):
        show_all()
    failed = [record.message.partition(" failed: ")[0] for record in caplog.records if record.name == "tasks.artifacts"]
    assert failed == [
        "Prefect artifact: table rows",
        "Prefect artifact: text note",
        "Prefect artifact: progress train",
    ]
