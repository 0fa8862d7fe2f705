"""What an outage of a tracker means: a warning for figures of runs, a transient error for the registry."""

from __future__ import annotations

import pytest

from base.errors import AuthenticationError, ConfigError, OperationalError, ServiceError, is_retryable_exit_code
from tasks.tracking.outages import Outages, best_effort, explained, registry_call


class Sender:
    """Calls on runs, of which some fail."""

    def __init__(self) -> None:
        self.outages = Outages()

    @best_effort
    def send(self, run_id: str | None, error: Exception | None) -> str | None:
        """Send a value."""
        if error is not None:
            raise error
        return run_id


@registry_call
def find(error: Exception | None) -> int:
    """Find a version."""
    if error is not None:
        raise error
    return 3


def test_an_outage_is_told_once_at_once_and_again_at_the_end(caplog: pytest.LogCaptureFixture) -> None:
    sender, told = Sender(), list[str]()
    sender.outages.report = told.append
    assert sender.send("r", None) == "r"
    assert (caplog.text, told, sender.outages.remark()) == ("", [], "")
    for error in (ConnectionError("refused\nmore"), TimeoutError()):
        assert sender.send("r", error) is None
    assert sender.send(None, None) is None  # a run that could not be created says nothing of the tracker
    assert [record.message for record in caplog.records] == [
        "tracking: send failed: refused",
        "tracking: send failed: TimeoutError()",
    ]
    assert told == ["tracking is lost: refused. The run goes on; its figures are kept in the run directory"]
    assert sender.outages.remark() == " (incomplete: 2 calls were lost, the first because refused)"
    sender.send("r", None)
    sender.send("r", ConnectionError("again"))
    assert len(told) == 2
    assert (Sender.send.__name__, Sender.send.__doc__) == ("send", "Send a value.")


DATABASE = "(sqlite3.OperationalError) table mcp_servers already exists\n[SQL: \nCREATE TABLE mcp_servers (\n name"


@pytest.mark.parametrize(
    ("text", "kind", "told"),
    [
        (DATABASE, OperationalError, "the database says: table mcp_servers already exists"),
        (f"API request failed: {DATABASE}", OperationalError, "the database says: table mcp_servers already exists"),
        ("Detected out-of-date database schema (found version 1)", OperationalError, "mlflow db upgrade"),
        ("API request to endpoint /x failed with error code 401 != 200.", AuthenticationError, "MLFLOW_TRACKING_USER"),
        ("API request to endpoint /x failed with error code 404 != 200.", ServiceError, "correct tracking.uri"),
        ("postgresql://me:secret@db/x is broken", OperationalError, "postgresql://***@db/x is broken"),
    ],
)
def test_an_error_of_mlflow_is_one_line_that_says_what_to_do(text: str, kind: type[Exception], told: str) -> None:
    error = explained(RuntimeError(text), "the model registry could not version")
    assert type(error) is kind
    assert told in str(error)
    assert "\n" not in str(error) and "SQL" not in str(error) and "secret" not in str(error)


def test_an_outage_of_the_registry_is_transient_and_keeps_its_cause() -> None:
    assert find(None) == 3
    cause = ConnectionError("refused")
    with pytest.raises(OperationalError, match="the model registry could not find: refused") as caught:
        find(cause)
    assert caught.value.__cause__ is cause
    assert is_retryable_exit_code(caught.value.exit_code)


def test_an_error_that_says_whose_fault_it_is_passes_unchanged() -> None:
    error = ConfigError("no such model")
    with pytest.raises(ConfigError) as caught:
        find(error)
    assert caught.value is error
