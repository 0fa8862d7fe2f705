"""What the states of an interrupted flow run say; tests/e2e/ reads them on a server."""

from __future__ import annotations

import signal
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.exceptions import TerminationSignal
from prefect.settings import PREFECT_API_URL, PREFECT_CLIENT_MAX_RETRIES, temporary_settings

from tasks.interruptions.states import INTERRUPTED, _interrupted, _is_open, _position, describe
from tasks.records.events import write_event

END = datetime(2026, 11, 29, tzinfo=UTC)
KILLED = "Process exited with status code: -9. It was killed."


def crashed(**values: Any) -> State:
    return State(type=StateType.CRASHED, **values)


def flow_run(directory: Path, **values: Any) -> FlowRun:
    overrides = {"runs_directory": str(directory.parent), "name": directory.name}
    return FlowRun(flow_id=uuid4(), parameters={"config": "configs/tiny.yaml", "overrides": overrides}, **values)


@pytest.mark.parametrize(
    ("state", "position", "text"),
    [
        (crashed(data=KeyboardInterrupt()), "at step 3 of 9; checkpoint 2", " by Ctrl-C at step 3 of 9; checkpoint 2"),
        (crashed(data=TerminationSignal(signal.SIGHUP)), "in data", " by SIGHUP in data"),
        (crashed(data=SystemExit(1)), "", " by an exit with code 1"),
        (crashed(message=KILLED), "after data", f" after data. {KILLED}"),
        (crashed(), "", ""),
    ],
)
def test_a_crash_is_told_by_its_cause_and_its_place(state: State, position: str, text: str) -> None:
    assert _interrupted(state, position) == f"interrupted{text}"


def test_the_place_is_where_this_flow_run_came_in_its_run_directory(tmp_path: Path) -> None:
    directory, now, hour = tmp_path / "tiny", datetime.now(UTC), timedelta(hours=1)
    assert _position(flow_run(directory)) == ""
    directory.mkdir()
    write_event(directory, "data", "started")
    assert _position(flow_run(directory)) == "in data"
    assert _position(flow_run(directory, start_time=now - hour)) == "in data"
    assert _position(flow_run(directory, start_time=now + hour)) == ""  # what an earlier one did
    assert _position(FlowRun(flow_id=uuid4(), parameters={"config": "no/such.yaml"})) == ""


@pytest.mark.parametrize(
    ("state", "is_open"),
    [
        ({"type": StateType.RUNNING}, True),
        ({"type": StateType.CRASHED}, True),
        ({"type": StateType.CRASHED, "name": INTERRUPTED}, False),  # of an attempt before
        ({"type": StateType.COMPLETED}, False),
        ({"type": StateType.RUNNING, "timestamp": END + timedelta(seconds=1)}, False),  # of the next attempt
    ],
)
def test_only_what_the_ended_attempt_left_open_is_described(state: dict[str, Any], is_open: bool) -> None:
    given = State(**{"timestamp": END - timedelta(seconds=1), **state})
    assert _is_open(given, crashed(timestamp=END)) == is_open


def test_without_a_server_the_run_ends_as_it_did(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:9/api", PREFECT_CLIENT_MAX_RETRIES: 0}):
        describe(None, flow_run(tmp_path), crashed(message=KILLED))
    assert "keeps Prefect's message" in caplog.text
