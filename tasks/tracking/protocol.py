"""Owns what steps know of a tracker: the calls that record a run, and a registered version.
tasks/tracking/mlflow_tracker.py is one.

It knows nothing of MLflow.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol


class Tracker(Protocol):
    """Where runs are recorded. `None` for a run id means that the run could not be made; calls then do nothing."""

    def start(self, name: str, *, parent: str | None, step: str, identity: str, run_key: str) -> str | None:
        """Open the run of a step, found again by (step, identity, name, run_key) or new; its id."""

    def log(
        self,
        run_id: str | None,
        *,
        params: Mapping[str, Any] | None = None,
        metrics: Mapping[str, float] | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> None:
        """Record values. A parameter that exists keeps its first value."""

    def points(self, run_id: str | None, points: Iterable[tuple[str, float, int, int]]) -> bool:
        """Record (metric, value, step, unix milliseconds); False when they could not be sent."""

    def artifact(self, run_id: str | None, path: Path, folder: str = "") -> None:
        """Copy a small file (a plot, a table) to the run."""

    def finish(self, run_id: str | None, status: str) -> None:
        """Close the run as FINISHED, FAILED or KILLED."""


@dataclass(frozen=True)
class ModelVersion:
    """A registered version, by reference: `uri` is where its weights lie."""

    name: str
    version: int
    uri: str
    tags: dict[str, str]
    model_id: str | None = None
    """MLflow's id of the logged model behind the version."""
