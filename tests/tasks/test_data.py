"""The data step: shards from the run's documents, recorded by reference, and made again when documents change."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from prefect.logging import disable_run_logger

from base import storage
from cherry.data.shards import TokenDataset
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
    assert run["tags"]["tokens"] == str(record.figures["tokens"]) == str(dataset["profile"]["tokens"])


def test_a_flow_that_finds_its_data_prepared_records_it_all_the_same(context: RunContext) -> None:
    runs = context.tracker().runs
    parents = [runs.start("tiny", parent=None, step="flow", identity=one, run_key=context.key) for one in ("a", "b")]
    first, again = (prepare_data.fn(replace(context, parent_run_id=parent)) for parent in parents)
    assert (first.reused, again.reused) == (False, True)
    stored = [json.loads(path.read_text()) for path in (context.path.parent / "tracking" / "runs").glob("*.json")]
    flows = [run for run in stored if run["step"] == "flow"]
    assert len(flows) == 2 and flows[0]["inputs"] == flows[1]["inputs"] != []
    children = {run["parent"]: run for run in stored if run["step"] == "data"}
    assert set(children) == set(parents)
    assert children[parents[1]]["tags"]["cherry.reused_from"] == first.run_id
    assert children[parents[1]]["inputs"] == children[parents[0]]["inputs"] == flows[0]["inputs"]
    assert {run["status"] for run in children.values()} == {"FINISHED"}
    assert again.run_id == first.run_id


def test_the_same_documents_are_not_tokenized_again_and_changed_ones_are(context: RunContext) -> None:
    first = prepare_data.fn(context)
    again = prepare_data.fn(context)
    assert again.reused
    assert again.fingerprint == first.fingerprint
    (Path(context.config.data.source) / "20.txt").write_text("one more document " * 20)
    changed = prepare_data.fn(context)
    assert not changed.reused
    assert (changed.figures["documents"], changed.fingerprint != first.fingerprint) == (21, True)


def inputs_of(context: RunContext, run_id: str | None) -> list[str]:
    run = json.loads((context.path.parent / "tracking" / "runs" / f"{run_id}.json").read_text())
    return [entry["dataset"] for entry in run["inputs"]]


def test_the_same_documents_are_prepared_once_for_all_runs(context: RunContext) -> None:
    first = prepare_data.fn(context)
    other = replace(context, directory=str(context.path.parent / "other"))
    second = prepare_data.fn(other)
    assert (second.reused, second.fingerprint, second.figures) == (False, first.fingerprint, first.figures)
    assert second.outputs == {"data": str(other.path / "data")}
    assert (other.path / "data").resolve() == (context.path / "data").resolve()
    assert "prepared before" in (other.path / "events.jsonl").read_text()
    assert inputs_of(other, second.run_id) == [context.config.data.source]
    assert TokenDataset(str(other.path / "data")).manifest.documents == 20


def test_found_data_is_an_input_of_the_flows_run(context: RunContext) -> None:
    prepare_data.fn(context)
    flow = context.tracker().runs.start("tiny", parent=None, step="flow", identity="f", run_key=context.key)
    assert prepare_data.fn(replace(context, parent_run_id=flow)).reused
    assert inputs_of(context, flow) == [context.config.data.source]


def test_data_in_the_run_itself_is_used_as_it_is_and_kept_when_other_data_is_wanted(context: RunContext) -> None:
    record = prepare_data.fn(context)
    folder = context.path / "data"
    entry = folder.resolve()
    folder.unlink()
    entry.rename(folder)  # where earlier versions had it
    assert prepare_data.fn(context).reused
    assert not folder.is_symlink()
    (Path(context.config.data.source) / "20.txt").write_text("one more document " * 20)
    assert not prepare_data.fn(context).reused
    assert folder.is_symlink()
    assert storage.is_committed(f"{folder}.{record.fingerprint[:8]}")


def test_lost_shards_are_made_again_and_training_has_the_same_input(context: RunContext) -> None:
    first = prepare_data.fn(context)
    folder = context.path / "data"
    before = {path.name: storage.digest(str(path)) for path in folder.iterdir() if path.name != storage.MARKER}
    (folder / "train-00000.bin").unlink()
    again = prepare_data.fn(context)
    assert (again.reused, again.fingerprint) == (False, first.fingerprint)
    after = {path.name: storage.digest(str(path)) for path in folder.iterdir() if path.name != storage.MARKER}
    assert after == before
