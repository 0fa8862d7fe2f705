"""Names of checkpoint directories, and the list of committed ones; imports no torch."""

from __future__ import annotations

import re

from base import storage

_STEP = re.compile(r"^step_(\d+)$")


def step_name(step: int) -> str:
    """Directory name of a step's checkpoint, like `step_1000`."""
    return f"step_{step}"


def step_of(uri: str) -> int | None:
    """Step of a checkpoint directory by its name; `None` if it is not named like one."""
    match = _STEP.match(uri.rstrip("/").rsplit("/", 1)[-1])
    return int(match[1]) if match else None


def committed_steps(directory: str) -> list[int]:
    """Steps with a committed checkpoint, ascending. It lists storage: call it on one rank only."""
    steps = [step for name in storage.list_names(directory) if (step := step_of(name)) is not None]
    return sorted(step for step in steps if storage.is_committed(storage.join(directory, step_name(step))))


def newest_checkpoint(directory: str, *, before: int | None = None) -> str | None:
    """URI of the newest committed checkpoint of a step below `before` (if given), or `None`. On one rank only."""
    steps = [step for step in committed_steps(directory) if before is None or step < before]
    return storage.join(directory, step_name(steps[-1])) if steps else None


def unreadable_checkpoints(directory: str) -> list[str]:
    """URIs of checkpoints whose markers are there, but empty or cut short, by step. On one rank only."""
    steps = sorted(step for name in storage.list_names(directory) if (step := step_of(name)) is not None)
    uris = [storage.join(directory, step_name(step)) for step in steps]
    return [u for u in uris if storage.exists(storage.join(u, storage.MARKER)) and not storage.is_committed(u)]
