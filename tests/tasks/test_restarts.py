"""Flow runs that Prefect starts again: how often, and when they wait; tests/e2e/test_restarts.py kills real ones."""

import threading

import pytest

from base.errors import InvalidInputError
from tasks.lease import drop_lease, locked, take_lease
from tasks.restarts import refuse_endless_restarts, starts_before, wait_for_holder


def test_outside_a_flow_run_nothing_was_started_before():
    assert starts_before() == 0


@pytest.mark.parametrize(("starts", "refused"), [(0, False), (2, False), (3, True), (4, True)])
def test_a_run_is_started_as_often_as_it_has_attempts(starts, refused):
    if refused:
        with pytest.raises(InvalidInputError, match=f"started {starts} times.*retry.attempts is 3"):
            refuse_endless_restarts(starts, 3)
    else:
        refuse_endless_restarts(starts, 3)


def test_it_waits_for_the_process_that_still_works(tmp_path, monkeypatch):
    monkeypatch.setattr("tasks.restarts._POLL_S", 0.01)
    wait_for_holder(tmp_path / "missing")
    take_lease(tmp_path)
    waiting = threading.Thread(target=wait_for_holder, args=(tmp_path,))
    waiting.start()
    waiting.join(0.05)
    assert waiting.is_alive()
    with locked(tmp_path):
        drop_lease(tmp_path)
    waiting.join(30)
    assert not waiting.is_alive()
