"""Tracker protocols: records of runs, the model registry, and the values that both take.

tasks/tracking/connect.py chooses the tracker that the config names: MLflow (mlflow_tracker.py) or JSON files
(json_tracker.py). Calls on runs are best effort: an outage is a warning in the log and never fails a step, for what
could not be sent is still on disk. Calls on the registry raise, since nothing else records a version.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

RunStatus = Literal["FINISHED", "FAILED", "KILLED"]


class Point(NamedTuple):
    """One point of a series."""

    name: str
    value: float
    step: int
    unix_ms: int


@dataclass(frozen=True)
class Dataset:
    """A dataset, by reference."""

    name: str
    digest: str
    source: str
    """URI of the data."""
    profile: Mapping[str, int]
    """Counts that describe it, like documents and bytes."""
    use: str = "training"


@dataclass(frozen=True)
class ModelVersion:
    """A registered version, by reference."""

    name: str
    version: int
    uri: str
    """URI of the weights."""
    tags: dict[str, str] = field(default_factory=dict)
    model_id: str | None = None
    """The tracker's id of the model as an input or output of runs; `None` where it has none."""

    @property
    def title(self) -> str:
        """Its name in sentences and comparisons, like `cherry-tiny v3`."""
        return f"{self.name} v{self.version}"


class RunTracker(Protocol):
    """Records of runs. A run id of `None` is a run that could not be created: calls on it do nothing."""

    def start(
        self, name: str, *, parent: str | None, step: str, identity: str, run_key: str, reused: str | None = None
    ) -> str | None:
        """Id of a step's run, opened: found again by (name, step, identity, run_key), or new.

        With `reused`, a new one gets the parameters, figures, datasets and models of that run, whose output it stands
        for.
        """

    def log(
        self,
        run_id: str | None,
        *,
        params: Mapping[str, Any] | None = None,
        metrics: Mapping[str, float] | None = None,
        tags: Mapping[str, str] | None = None,
        note: str | None = None,
        inputs: Sequence[Dataset | ModelVersion] = (),
        outputs: Sequence[ModelVersion] = (),
    ) -> None:
        """Record values, a note in Markdown, and what the run took and made.

        A parameter keeps its first value. An input or output that is already recorded is not recorded twice.
        """

    def points(self, run_id: str | None, points: Iterable[Point]) -> bool:
        """Append points to series; False when they could not be sent."""

    def artifact(self, run_id: str | None, path: Path, folder: str = "") -> None:
        """Copy a small file (a plot, a table) to the run."""

    def finish(self, run_id: str | None, status: RunStatus, *, family: bool = False) -> None:
        """Close a run. With `family`, close it and its children as far as they are open: their process is gone."""


class ModelRegistry(Protocol):
    """Registered versions of models, and the aliases that point at them.

    Raises:
        OperationalError: (every method) the registry could not be reached.
    """

    def register(
        self, run_id: str | None, name: str, uri: str, *, identity: str, alias: str, tags: Mapping[str, str]
    ) -> ModelVersion:
        """The version of the weights at `uri`, with `alias` pointing at it: found again by `identity`, or new."""

    def version(self, name: str, *, alias: str | None = None, number: int | None = None) -> ModelVersion | None:
        """A version by alias or number; `None` when there is none."""

    def versions(self) -> list[ModelVersion]:
        """Every version of every model."""

    def set_alias(self, name: str, alias: str, version: int, *, replacing: int | Literal["any"] | None = "any") -> bool:
        """Point an alias at a version; the one before it is kept in the version's tag `previous_<alias>`.

        Args:
            replacing: the version that the alias points at now, `None` for no version. When it points at another one,
                nothing is changed: of several processes that compare with the same version, one replaces it.

        Returns:
            Whether the alias points at the version now.

        Raises:
            OperationalError: nor could it be kept from other processes for as long as the change takes.
        """

    def annotate(
        self,
        version: ModelVersion,
        *,
        tags: Mapping[str, str] | None = None,
        card: str | None = None,
        model_card: str | None = None,
    ) -> None:
        """Add tags to a version, and set what the registry's pages show of it and of its model, in Markdown."""


class Tracker(Protocol):
    """One tracking backend."""

    @property
    def runs(self) -> RunTracker:
        """Records of runs in this backend."""

    @property
    def registry(self) -> ModelRegistry:
        """The model registry."""

    @property
    def address(self) -> str:
        """URI of the backend, without credentials."""

    def connect_early(self) -> None:
        """Do the first call's work in a thread; an error in it is left to the first call."""

    def open(self, on_outage: Callable[[str], None]) -> None:
        """Check that runs can be recorded and versions registered, before anything is computed.

        Args:
            on_outage: told, in one line, when a later call on runs is the first of an outage.

        Raises:
            CherryError: they cannot; the text says what to do.
        """

    def page(self, run_id: str | None = None) -> str:
        """Page of all runs, a URL, command or path; with `run_id` that of one run, a Markdown link or its id.

        The former tells too when calls on runs were lost.
        """

    def system_metrics(self, run_id: str | None) -> Callable[[], None] | None:
        """Record processor, memory, disk and GPU use of this node until the returned function is called.

        `None` when the backend does not record them.
        """
