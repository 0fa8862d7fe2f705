"""Owns what a run's checkpoints are called, and which of them are committed.

It knows nothing of what is in them, and does without torch.
"""

from __future__ import annotations

import re

from base import storage

_STEP = re.compile(r"^step_(\d+)$")


def step_name(step: int) -> str:
    """The directory name of a step's checkpoint."""
    return f"step_{step}"


def step_of(uri: str) -> int | None:
    """The step of a checkpoint's directory, by its name; `None` when the name is another's."""
    match = _STEP.match(uri.rstrip("/").rsplit("/", 1)[-1])
    return int(match[1]) if match else None


def committed_steps(directory: str) -> list[int]:
    """Steps with a committed checkpoint, oldest first. One rank only: it lists storage."""
    steps = [step for name in storage.list_names(directory) if (step := step_of(name)) is not None]
    return sorted(step for step in steps if storage.is_committed(storage.join(directory, step_name(step))))


def newest_checkpoint(directory: str, *, before: int | None = None) -> str | None:
    """URI of the newest committed checkpoint (of a step below `before`), or `None`. One rank only."""
    steps = [step for step in committed_steps(directory) if before is None or step < before]
    return storage.join(directory, step_name(steps[-1])) if steps else None
