"""Events of a flow run that Prefect's server has not seen since it was started, and that it waits for.

A server handles events in order: that of a state waits for that of the state before it, if that is less than five
minutes older. Which events it has seen it keeps in memory only (prefect/server/events/ordering/memory.py of 3.8.8): one
that was started while a run trained waits for what its predecessor saw, for a quarter of an hour, after which an event
is too old for an automation that looks at the half minute after it.
"""

from __future__ import annotations

from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.objects import State, StateType

_BEFORE_AN_END = (StateType.SCHEDULED, StateType.PENDING, StateType.RUNNING)


def repeat_events(client: SyncPrefectClient, flow_run_id: UUID, end: State) -> None:
    """Send the server the events of the states before `end` once more, so that the event of `end` need not wait.

    An event's id is that of its state, so a server that has seen it leaves it alone. They name no related resources, by
    which this project's automations know its runs: none of them starts by a repeated event.
    """
    events = [
        {
            "id": str(state.id),
            "occurred": state.timestamp.isoformat(),
            "event": f"prefect.flow-run.{state.name}",
            "resource": {"prefect.resource.id": f"prefect.flow-run.{flow_run_id}"},
        }
        for state in client.read_flow_run_states(flow_run_id)
        if state.type in _BEFORE_AN_END and state.timestamp < end.timestamp
    ]
    client.request("POST", "/events", json=events)
