"""Prefect's states of a flow run that was interrupted or cancelled: they say where, for its tasks and subflows too.

Prefect's own messages name the Python exception, or say only that the run was cancelled; and tasks of a process that
was killed stay Running. A flow run that crashed becomes `Interrupted`, of the type Crashed: a second state of the name
Crashed would be a second event of that name, which starts automations.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import FlowRunFilter, TaskRunFilter
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.client.schemas.sorting import FlowRunSort
from prefect.exceptions import TerminationSignal

from base.errors import CherryError
from tasks.interruptions.position import how_far
from tasks.interruptions.unseen_events import repeat_events
from tasks.overrides import DEFAULT_CONFIG, resolve, run_directory
from tasks.processes.programs import module_command, module_environment
from tasks.run_logger import logger

INTERRUPTED = "Interrupted"
_UNFINISHED = [StateType.SCHEDULED, StateType.PENDING, StateType.RUNNING, StateType.CANCELLING, StateType.CRASHED]
# A worker sets a run to Cancelled after the hook, and after up to 30 s of grace for its process.
_CANCEL_WAIT_S = 120.0
_POLL_S = 0.5


def describe(flow: Any, flow_run: FlowRun, state: State) -> None:
    """Say in the states of a flow run what happened to it and how far it came: a Prefect hook, after the clean-up.

    It also lets automations know of the end at once, after a restart of the server too (see `repeat_events`).
    It runs in the flow's process, or in another one when that was killed. Best effort: a server that does not answer
    keeps Prefect's own messages.
    """
    try:
        with get_client(sync_client=True) as client:
            repeat_events(client, flow_run.id, state)
            _describe(client, flow_run, state)
    except Exception as error:  # Prefect's, httpx's and pydantic's; the run has ended as it did all the same
        logger.warning("the state of the flow run keeps Prefect's message: %s", error)


def _describe(client: SyncPrefectClient, flow_run: FlowRun, state: State) -> None:
    subflows = client.read_flow_runs(
        flow_run_filter=_filter(parent_flow_run_id={"any_": [flow_run.id]}),
        sort=FlowRunSort.EXPECTED_START_TIME_DESC,
    )
    # The newest subflow that did anything, else the flow run itself.
    position = next((found for one in (*subflows, flow_run) if (found := _position(one))), "")
    cancelled = state.is_cancelling() or state.is_cancelled()
    text = f"cancelled {position}".strip() if cancelled else _interrupted(state, position)
    kind, name = (StateType.CANCELLED, "Cancelled") if cancelled else (StateType.CRASHED, INTERRUPTED)
    if cancelled:
        _describe_later(flow_run.id, text)
    # A hook that comes late must not end the next attempt: a forced state wins over its Running.
    elif (now := client.read_flow_run(flow_run.id).state) is not None and now.is_crashed():
        client.set_flow_run_state(flow_run.id, State(type=kind, name=name, message=text), force=True)
    open_subflows = [one for one in subflows if _is_open(one.state, state)]
    for one in open_subflows:
        client.set_flow_run_state(one.id, State(type=kind, name=name, message=text), force=True)
    # The tasks of subflows that ended by themselves are described by their own hooks.
    owners = {"id": {"any_": [flow_run.id, *(one.id for one in open_subflows)]}}
    unfinished = TaskRunFilter.model_validate({"state": {"type": {"any_": _UNFINISHED}}})
    for task_run in client.read_task_runs(flow_run_filter=_filter(**owners), task_run_filter=unfinished):
        if _is_open(task_run.state, state):
            client.set_task_run_state(task_run.id, State(type=kind, name=name, message=text), force=True)


def _filter(**conditions: Any) -> FlowRunFilter:
    return FlowRunFilter.model_validate(conditions)


def _is_open(state: State | None, end: State) -> bool:
    """Whether a state is of the attempt that ended with `end`, and has nothing to say yet of how."""
    if state is None or state.type not in _UNFINISHED or state.name == INTERRUPTED:
        return False
    return state.timestamp <= end.timestamp


def _position(flow_run: FlowRun) -> str:
    """How far a flow run came since it was first started; empty when it did nothing in its run directory."""
    try:
        given = flow_run.parameters
        config = resolve(given.get("config", DEFAULT_CONFIG), given.get("overrides") or {})
        directory = Path(run_directory(config))
    except CherryError:
        return ""
    return how_far(directory, since=0.0 if flow_run.start_time is None else flow_run.start_time.timestamp())


def _interrupted(state: State, position: str) -> str:
    """A sentence about a crash: its cause, where Prefect has kept it, and how far the run came."""
    error = state.data
    if isinstance(error, KeyboardInterrupt):
        cause = " by Ctrl-C"
    elif isinstance(error, TerminationSignal):
        cause = f" by {signal.Signals(error.signal).name}"
    elif isinstance(error, SystemExit):
        cause = f" by an exit with code {error.code}"
    else:  # the worker's, like `Process exited with status code: -9. ...`
        return f"interrupted {position}".strip() + (f". {state.message}" if state.message else "")
    return f"interrupted{cause} {position}".strip()


def _describe_later(flow_run_id: UUID, text: str) -> None:
    """Start a process that waits until the flow run is Cancelled: Prefect sets that, with its own text, after hooks."""
    subprocess.Popen(
        module_command("tasks.interruptions.states", [str(flow_run_id), text]),
        env=module_environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,  # whoever started the hook waits for the end of its output
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    ).returncode = 0  # it outlives this process on purpose: Popen shall not warn of it


def main(arguments: Sequence[str]) -> None:
    """The process that `describe` leaves behind after a cancellation: sets the message of a Cancelled flow run."""
    flow_run_id, text = UUID(arguments[0]), arguments[1]
    end = time.monotonic() + _CANCEL_WAIT_S
    with get_client(sync_client=True) as client:
        while time.monotonic() < end:
            state = client.read_flow_run(flow_run_id).state
            if state is not None and state.is_cancelled():
                described = State(type=StateType.CANCELLED, name=state.name, message=text)
                client.set_flow_run_state(flow_run_id, described, force=True)
                return
            time.sleep(_POLL_S)


if __name__ == "__main__":
    main(sys.argv[1:])
