"""The data step: shards from the run's documents, recorded by reference, and made again when documents change."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from prefect.logging import disable_run_logger

from base import storage
from tasks.data import prepare_data
from tasks.overrides import resolve
from tasks.steps import RunContext


@pytest.fixture(autouse=True)
def no_run_logger() -> Iterator[None]:
    with disable_run_logger():
        yield


@pytest.fixture
def context(tmp_path: Path) -> RunContext:
    """A run over 20 documents, tracked in JSON files."""
    (tmp_path / "documents").mkdir()
    for number in range(20):
        (tmp_path / "documents" / f"{number:02d}.txt").write_text(f"document {number}: " + "some words " * 40)
    overrides = {
        "runs_directory": str(tmp_path),
        "data": {"source": str(tmp_path / "documents"), "sequence_length": 32, "heldout_fraction": 0.2},
        "model": {"vocab_size": 600},
        "tracking": {"uri": "json:"},
    }
    return RunContext(str(tmp_path / "tiny"), resolve("configs/tiny.yaml", overrides))


def test_documents_become_committed_shards_that_are_recorded_by_reference(context: RunContext) -> None:
    record = prepare_data.fn(context)
    assert record.outputs == {"data": str(context.path / "data")}
    assert storage.is_committed(record.outputs["data"])
    assert record.figures["documents"] == 20
    assert record.figures["sequences"] > 0
    run = json.loads((context.path.parent / "tracking" / "runs" / f"{record.run_id}.json").read_text())
    ((dataset),) = run["inputs"]
    assert (dataset["dataset"], dataset["profile"]["documents"]) == (context.config.data.source, 20)
    assert run["metrics"]["tokens"] == record.figures["tokens"] == dataset["profile"]["tokens"]


def test_the_same_documents_are_not_tokenized_again_and_changed_ones_are(context: RunContext) -> None:
    first = prepare_data.fn(context)
    again = prepare_data.fn(context)
    assert again.reused
    assert again.fingerprint == first.fingerprint
    (Path(context.config.data.source) / "20.txt").write_text("one more document " * 20)
    changed = prepare_data.fn(context)
    assert not changed.reused
    assert (changed.figures["documents"], changed.fingerprint != first.fingerprint) == (21, True)
