"""A claim on a registered model of MLflow, whose servers have neither locks nor conditional writes.

Whoever wants the claim writes a token of its own into a tag of the model, waits, and has the claim if its token is
still there: of several that saw the tag free, the last one to write has it. One that took longer from reading to
writing than the others wait begins again, so two have the claim at one time only when a request that was sent in time
takes longer than `_SETTLE_S` to be carried out.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from base.errors import OperationalError

if TYPE_CHECKING:
    from mlflow import MlflowClient

_SETTLE_S = 2.0
# A claim that others have seen for this long is taken from its process, which may have died. Measured by the clock of
# who waits: those of two hosts may differ by more. What is done under it takes a few requests.
_EXPIRES_S = 60.0


@contextmanager
def claimed(client: MlflowClient, name: str, tag: str, *, locked: bool = False) -> Iterator[Callable[[], None]]:
    """Hold the claim `tag` of the registered model `name`; waits for the process that has it.

    Yields a function that raises OperationalError when the claim is lost, or may soon be: call it before a change.

    Args:
        locked: the caller's lock keeps out all but a server's clients, who wait after they write. So this one, who
            has done what it does before they have waited, need not.
    """
    token = uuid.uuid4().hex
    seen, since = "", time.monotonic()
    while True:
        began = time.monotonic()
        holder = _holder(client, name, tag)
        if holder != seen:
            seen, since = holder, began
        is_free = not holder or began - since > _EXPIRES_S
        if is_free and _take(client, name, tag, token, began=began, settle_s=0.0 if locked else _SETTLE_S):
            break
        time.sleep(_SETTLE_S / 4)

    def check() -> None:
        if time.monotonic() - began > _EXPIRES_S / 2 or _holder(client, name, tag) != token:
            raise OperationalError(f"the registry is slow: the claim {tag} of {name} was lost. It is tried again.")

    try:
        yield check
    finally:
        _give_up(client, name, tag, token)


def _take(client: MlflowClient, name: str, tag: str, token: str, *, began: float, settle_s: float) -> bool:
    """Write the token into a tag that was found free at `began`; whether it is the claim's after the wait."""
    from mlflow.exceptions import MlflowException
    from mlflow.protos.databricks_pb2 import BAD_REQUEST, ErrorCode

    try:
        client.set_registered_model_tag(name, tag, token)
    except MlflowException as error:
        if error.error_code == ErrorCode.Name(BAD_REQUEST):
            return False  # another one has made the tag in the same moment, which the database refuses
        raise
    is_in_time = time.monotonic() - began < _SETTLE_S / 2
    time.sleep(settle_s)
    if not is_in_time:
        _give_up(client, name, tag, token)
        return False
    return _holder(client, name, tag) == token


def _give_up(client: MlflowClient, name: str, tag: str, token: str) -> None:
    if _holder(client, name, tag) == token:
        client.delete_registered_model_tag(name, tag)


def _holder(client: MlflowClient, name: str, tag: str) -> str:
    """Token of the process that has the claim, or is about to; empty without one."""
    return str(client.get_registered_model(name).tags.get(tag, ""))
