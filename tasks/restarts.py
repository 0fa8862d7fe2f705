"""Flow runs that Prefect starts again after a crash: how often, and which never."""

from __future__ import annotations

import time
from pathlib import Path
from uuid import UUID

from prefect import runtime
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import StateType

from base.errors import InvalidInputError
from tasks.lease import is_held, locked
from tasks.run_logger import run_logger

_POLL_S = 2.0


def starts_before() -> int:
    """How often this flow run was started before.

    Raises:
        InvalidInputError: it was cancelled.
    """
    flow_run_id = runtime.flow_run.root_flow_run_id
    if flow_run_id is None:
        return 0  # called outside a flow run
    with get_client(sync_client=True) as client:
        history = [state.type for state in client.read_flow_run_states(UUID(str(flow_run_id)))]
    if StateType.CANCELLING in history or StateType.CANCELLED in history:
        raise InvalidInputError(
            "this flow run was cancelled, so it does not start again. Start a new one with the same parameters; "
            "finished steps are found."
        )
    # A crash may be reported twice, by the runner and by the worker: starts are counted, of which this one is the last.
    return max(history.count(StateType.RUNNING) - 1, 0)


def refuse_endless_restarts(starts: int, attempts: int) -> None:
    """Let a flow run fail that has used up its attempts.

    Raises:
        InvalidInputError: as many starts before as attempts.
    """
    if starts >= attempts:
        raise InvalidInputError(
            f"this flow run was started {starts} times without an end, and retry.attempts is {attempts}. Look for the "
            "cause in its log and in train/rank-*.log, then start a new run with the same parameters; finished steps "
            "are found."
        )


def wait_for_holder(run_directory: Path) -> None:
    """Wait while another process works on the run: one that Prefect took for dead may still be training."""
    told = False
    while run_directory.is_dir():
        with locked(run_directory):
            if not is_held(run_directory):
                return
        if not told:
            run_logger().warning("the attempt before still works in %s; waiting for its end", run_directory)
            told = True
        time.sleep(_POLL_S)
