"""Owns what Prefect's page shows beside a run: how far training is, tables and links.

It knows nothing of the figures. A page that cannot be reached is a warning in the log, never the end of a step.
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

logger = logging.getLogger(__name__)
# Each update is a request to Prefect's server: twenty of them a run.
_STEP_PERCENT = 5.0


@contextmanager
def _forgiving(what: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # Prefect's, httpx' and the OS's errors
        logger.warning("Prefect's page: %s failed: %s", what, error)


def show_table(key: str, rows: Sequence[Mapping[str, Any]], description: str) -> None:
    """A table; `key` is lower case letters, digits and dashes."""
    with _forgiving(f"table {key}"):
        create_table_artifact([dict(row) for row in rows], key=key, description=description)


def show_markdown(key: str, text: str, description: str) -> None:
    """A text in Markdown."""
    with _forgiving(f"text {key}"):
        create_markdown_artifact(text, key=key, description=description)


class ProgressArtifact:
    """How far a step is, in percent, updated every few percent."""

    def __init__(self, key: str, description: str) -> None:
        self._key = key
        self._artifact: UUID | None = None
        self._shown = 0.0
        with _forgiving(f"progress {key}"):
            self._artifact = cast(UUID, create_progress_artifact(0.0, key=key, description=description))

    def reached(self, fraction: float | None) -> None:
        """Show a new fraction when it is far enough from the one that is shown."""
        if fraction is None or self._artifact is None:
            return
        percent = 100.0 * fraction
        if percent - self._shown >= _STEP_PERCENT or percent >= 100.0 > self._shown:
            self._shown = percent
            with _forgiving(f"progress {self._key}"):
                update_progress_artifact(artifact_id=self._artifact, progress=percent)
