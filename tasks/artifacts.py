"""Prefect artifacts of a run: training's progress, tables and links. Outside of a Prefect run they are left out.

Best effort: a server that cannot be reached is a warning in the log and never fails a step.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast
from uuid import UUID

from prefect.artifacts import (
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)

from tasks.run_logger import in_prefect_run

logger = logging.getLogger(__name__)
# Each update is a request to Prefect's server: twenty of them a run.
_STEP_PERCENT = 5.0


@contextmanager
def _best_effort(what: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # Prefect's, httpx' and the OS's errors
        logger.warning("Prefect artifact: %s failed: %s", what, error)


def show_table(key: str, rows: Sequence[Mapping[str, Any]], description: str) -> None:
    """Publish a table; `key` is lower-case letters, digits and dashes."""
    if not in_prefect_run():
        return
    with _best_effort(f"table {key}"):
        create_table_artifact([dict(row) for row in rows], key=key, description=description)


def show_markdown(key: str, text: str, description: str) -> None:
    """Publish a text in Markdown; `key` is lower-case letters, digits and dashes."""
    if not in_prefect_run():
        return
    with _best_effort(f"text {key}"):
        create_markdown_artifact(text, key=key, description=description)


class ProgressArtifact:
    """A progress bar of a step, updated every few percent."""

    def __init__(self, key: str, description: str) -> None:
        self._key = key
        self._artifact: UUID | None = None
        self._shown = 0.0
        if not in_prefect_run():
            return
        with _best_effort(f"progress {key}"):
            self._artifact = cast(UUID, create_progress_artifact(0.0, key=key, description=description))

    def reached(self, fraction: float) -> None:
        """Show that `fraction` of the step is done, if that is a few percent more than what is shown."""
        if self._artifact is None:
            return
        percent = 100.0 * fraction
        if percent - self._shown >= _STEP_PERCENT or percent >= 100.0 > self._shown:
            self._shown = percent
            with _best_effort(f"progress {self._key}"):
                update_progress_artifact(artifact_id=self._artifact, progress=percent)
