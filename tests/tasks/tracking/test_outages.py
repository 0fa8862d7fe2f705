"""What an outage of a tracker means: a warning for figures of runs, a transient error for the registry."""

from __future__ import annotations

import pytest

from base.errors import ConfigError, OperationalError, is_retryable_exit_code
from tasks.tracking.outages import best_effort, registry_call


@best_effort
def send(value: int) -> float:
    """Send a value."""
    return 12 / value


@registry_call
def find(error: Exception | None) -> int:
    """Find a version."""
    if error is not None:
        raise error
    return 3


def test_any_error_of_a_run_is_one_line_of_warning(caplog: pytest.LogCaptureFixture) -> None:
    assert send(4) == 3.0
    assert caplog.text == ""
    assert send(0) is None
    assert [record.message for record in caplog.records] == ["tracking: send failed: division by zero"]
    assert (send.__name__, send.__doc__) == ("send", "Send a value.")


def test_only_the_first_line_of_an_error_is_logged_and_one_without_text_by_its_name(
    caplog: pytest.LogCaptureFixture,
) -> None:
    @best_effort
    def fail(error: Exception) -> None:
        raise error

    fail(RuntimeError("first\nsecond"))
    fail(TimeoutError())
    assert [record.message for record in caplog.records] == [
        "tracking: fail failed: first",
        "tracking: fail failed: TimeoutError()",
    ]


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
