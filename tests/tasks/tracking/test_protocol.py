"""The tracker protocol, held by both trackers, of MLflow and of JSON files: runs, values, versions and aliases."""

from __future__ import annotations

import json
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from base.errors import MissingFileError, OperationalError
from tasks.code_version import CodeVersion, GitVersion
from tasks.run_config import TrackingConfig
from tasks.tracking.json_tracker import JsonTracker
from tasks.tracking.mlflow_tracker import MlflowTracker
from tasks.tracking.protocol import Dataset, Point, Tracker

pytestmark = pytest.mark.slow
CODE = CodeVersion("9.9", "d" * 64, GitVersion("c" * 40, "main", "https://example.org/cherry.git", dirty=True))
WHAT: dict[str, Any] = {"parent": None, "step": "train", "identity": "f1", "run_key": "here"}


@dataclass
class Stored:
    """What a backend keeps of a run, read past the tracker."""

    status: str
    params: dict[str, str]
    metrics: dict[str, float]
    tags: dict[str, str]
    note: str | None
    code: dict[str, str | None]
    datasets: list[tuple[str, str, dict[str, int], str]]
    models_in: int
    models_out: int
    artifacts: set[str] = field(default_factory=set)


@dataclass
class Backend:
    tracker: Tracker
    read: Callable[[str | None], Stored]
    history: Callable[[str | None, str], list[tuple[int, float]]]


def mlflow_backend(folder: Path) -> Backend:
    tracker = MlflowTracker(TrackingConfig(uri=f"sqlite:///{folder}/mlflow.db"), str(folder), CODE)
    with warnings.catch_warnings():
        # MLflow's modules and tables use what others have deprecated, which shows when they are first used.
        warnings.simplefilter("ignore")
        assert tracker.runs.start("warm", parent=None, step="flow", identity="0", run_key="k") is not None
    client, _ = tracker._connection.get()

    def read(run_id: str | None) -> Stored:
        run = client.get_run(str(run_id))
        tags = run.data.tags
        paths = [file for root in client.list_artifacts(str(run_id)) for file in [root, *files(run_id, root)]]
        return Stored(
            status=run.info.status,
            params=run.data.params,
            metrics=run.data.metrics,
            tags=tags,
            note=tags.get("mlflow.note.content"),
            code={
                "commit": tags.get("mlflow.source.git.commit"),
                "branch": tags.get("mlflow.source.git.branch"),
                "repository": tags.get("mlflow.source.git.repoURL"),
                "dirty": tags.get("cherry.git.dirty"),
                "package": tags.get("cherry.version"),
                "digest": tags.get("cherry.code_digest"),
            },
            datasets=[
                (
                    entry.dataset.name,
                    json.loads(entry.dataset.source)["uri"],
                    json.loads(entry.dataset.profile),
                    entry.tags[0].value,
                )
                for entry in run.inputs.dataset_inputs
            ],
            models_in=len(run.inputs.model_inputs or ()),
            models_out=len((run.outputs.model_outputs if run.outputs else None) or ()),
            artifacts={file.path for file in paths if not file.is_dir},
        )

    def files(run_id: str | None, root: Any) -> list[Any]:
        return list(client.list_artifacts(str(run_id), root.path)) if root.is_dir else []

    def history(run_id: str | None, name: str) -> list[tuple[int, float]]:
        return [(point.step, point.value) for point in client.get_metric_history(str(run_id), name)]

    return Backend(tracker, read, history)


def json_backend(folder: Path) -> Backend:
    tracker = JsonTracker("json:", str(folder), CODE)

    def read(run_id: str | None) -> Stored:
        file = tracker.runs.file(str(run_id))
        run = json.loads(file.read_text())
        code = {**run["code"]["git"], "package": run["code"]["package"], "digest": run["code"]["digest"]}
        data = [entry for entry in run["inputs"] if "dataset" in entry]
        kept = file.with_suffix("")
        return Stored(
            status=run["status"],
            params=run["params"],
            metrics=run["metrics"],
            tags=run["tags"],
            note=run["note"],
            code={**code, "dirty": str(code["dirty"]).lower()},
            datasets=[(entry["dataset"], entry["source"], entry["profile"], entry["use"]) for entry in data],
            models_in=len(run["inputs"]) - len(data),
            models_out=len(run["outputs"]),
            artifacts={path.relative_to(kept).as_posix() for path in kept.rglob("*") if path.is_file()},
        )

    def history(run_id: str | None, name: str) -> list[tuple[int, float]]:
        lines = tracker.runs.file(str(run_id)).with_suffix(".jsonl").read_text().splitlines()
        return [(point["step"], point["value"]) for point in map(json.loads, lines) if point["name"] == name]

    return Backend(tracker, read, history)


@pytest.fixture(scope="module", params=[mlflow_backend, json_backend])
def backend(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Backend:
    made: Backend = request.param(tmp_path_factory.mktemp("runs"))
    return made


def test_a_run_is_found_again_by_step_fingerprint_name_and_directory(backend: Backend) -> None:
    runs = backend.tracker.runs
    first = runs.start("mine-train", **WHAT)
    assert first is not None
    assert backend.read(first).code == {
        "commit": "c" * 40,
        "branch": "main",
        "repository": "https://example.org/cherry.git",
        "dirty": "true",
        "package": "9.9",
        "digest": "d" * 64,
    }
    runs.log(first, metrics={"kept": 1.0})
    runs.finish(first, "FAILED")
    assert backend.read(first).status == "FAILED"
    assert runs.start("mine-train", **WHAT) == first
    assert (backend.read(first).status, backend.read(first).metrics) == ("RUNNING", {"kept": 1.0})
    for other in ({"identity": "f2"}, {"run_key": "there"}, {"step": "export"}):
        assert runs.start("mine-train", **{**WHAT, **other}) != first
    assert runs.start("other-train", **WHAT) != first


def test_a_parameter_keeps_its_first_value_and_the_rest_is_recorded(backend: Backend, tmp_path: Path) -> None:
    runs = backend.tracker.runs
    run_id = runs.start("values", **WHAT)
    runs.log(run_id, params={"a": 1})
    runs.log(run_id, params={"a": 2, "b": 3}, metrics={"m": 0.5}, tags={"t": "u"}, note="**better**")
    (tmp_path / "plot.png").write_bytes(b"png")
    runs.artifact(run_id, tmp_path / "plot.png", "plots")
    runs.artifact(run_id, tmp_path / "plot.png")
    stored = backend.read(run_id)
    assert (stored.params["a"], stored.params["b"], stored.metrics["m"], stored.tags["t"]) == ("1", "3", 0.5, "u")
    assert (stored.note, stored.artifacts) == ("**better**", {"plot.png", "plots/plot.png"})


def test_calls_on_a_run_that_could_not_be_made_do_nothing(backend: Backend, tmp_path: Path) -> None:
    runs = backend.tracker.runs
    runs.log(None, metrics={"m": 1.0})
    runs.artifact(None, tmp_path / "none")
    runs.finish(None, "FINISHED", family=True)
    assert not runs.points(None, [Point("loss", 1.0, 1, 1)])
    assert backend.tracker.system_metrics(None) is None


def test_points_of_a_series_are_kept_in_order(backend: Backend) -> None:
    runs = backend.tracker.runs
    run_id = runs.start("points", **WHAT)
    assert runs.points(run_id, [Point("loss", step / 3, step, 1000 + step) for step in range(2500)])
    assert backend.history(run_id, "loss") == [(step, step / 3) for step in range(2500)]
    assert backend.read(run_id).metrics["loss"] == 2499 / 3


def test_open_children_end_with_their_parent(backend: Backend) -> None:
    runs = backend.tracker.runs
    parent = runs.start("family", **{**WHAT, "step": "flow"})
    children = [runs.start("family-x", **{**WHAT, "parent": parent, "step": step}) for step in ("a", "b")]
    stranger = runs.start("stranger", **WHAT)
    runs.finish(children[0], "FINISHED")
    runs.finish(parent, "KILLED", family=True)
    statuses = [backend.read(run_id).status for run_id in (parent, *children, stranger)]
    assert statuses == ["KILLED", "FINISHED", "KILLED", "RUNNING"]


def test_a_version_is_registered_once_by_reference_and_aliases_leave_a_trace(
    backend: Backend, capfd: pytest.CaptureFixture[str]
) -> None:
    registry = backend.tracker.registry
    run_id = backend.tracker.runs.start("model", **WHAT)
    assert registry.version("net", alias="candidate") is None
    first, again, second = (
        registry.register(run_id, "net", uri, identity=identity, alias="candidate", tags={"verdict": verdict})
        for uri, identity, verdict in (("/a", "i1", "better"), ("/a", "i1", "worse"), ("/b", "i2", "better"))
    )
    assert (first.version, again.version, second.version) == (1, 1, 2)
    assert first.model_id == again.model_id != second.model_id
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""
    candidate = registry.version("net", alias="candidate")
    assert candidate is not None
    assert (candidate.version, candidate.uri, candidate.tags["previous_candidate"]) == (2, "/b", "1")
    old = registry.version("net", number=1)
    assert old is not None and old.tags["verdict"] == "worse" and old.tags["cherry.identity"] == "i1"
    assert registry.version("net", number=7) is None
    assert registry.version("net", alias="champion") is None
    registry.annotate(old, tags={"deployed_at": "now"})
    registry.set_alias("net", "champion", 1)
    known = [(version.version, version.uri) for version in registry.versions() if version.name == "net"]
    assert sorted(known) == [(1, "/a"), (2, "/b")]
    registry.annotate(old, tags={"uri": "/moved"}, card="moved")
    moved = registry.version("net", number=1)
    assert moved is not None and moved.uri == "/moved"
    champion = registry.version("net", alias="champion")
    assert champion is not None and (champion.version, champion.tags["deployed_at"]) == (1, "now")
    assert "previous_champion" not in champion.tags


def test_an_alias_is_moved_only_from_the_version_that_was_compared_with(backend: Backend) -> None:
    registry = backend.tracker.registry
    for number in (1, 2, 3):
        registry.register(None, "cas", f"/{number}", identity=f"i{number}", alias="candidate", tags={})
    assert not registry.set_alias("cas", "champion", 1, replacing=2)  # it points at none
    assert registry.set_alias("cas", "champion", 1, replacing=None)
    assert registry.set_alias("cas", "champion", 1, replacing=None)  # a retry, whose first answer was lost
    assert not registry.set_alias("cas", "champion", 2, replacing=None)
    assert registry.set_alias("cas", "champion", 3, replacing=1)
    assert not registry.set_alias("cas", "champion", 2, replacing=1)
    champion = registry.version("cas", alias="champion")
    assert champion is not None and (champion.version, champion.tags["previous_champion"]) == (3, "1")


@pytest.mark.slow
def test_of_versions_that_replace_each_other_at_once_each_is_better_than_the_one_before(backend: Backend) -> None:
    registry, losses = backend.tracker.registry, dict(enumerate([5.0, 1.5, 4.0, 2.0, 3.0, 1.0, 4.5, 2.5], start=1))
    for number in losses:
        registry.register(None, "race", f"/{number}", identity=f"i{number}", alias="candidate", tags={})
    begin = threading.Barrier(len(losses))

    def compete(number: int) -> None:
        begin.wait()
        while True:
            champion = registry.version("race", alias="champion")
            seen = None if champion is None else champion.version
            if seen is not None and losses[seen] <= losses[number]:
                return
            if registry.set_alias("race", "champion", number, replacing=seen):
                return

    with ThreadPoolExecutor(len(losses)) as pool:
        list(pool.map(compete, losses))
    champion = registry.version("race", alias="champion")
    assert champion is not None and losses[champion.version] == min(losses.values())
    while (before := champion.tags.get("previous_champion")) is not None:
        assert losses[int(before)] > losses[champion.version]
        champion = registry.version("race", number=int(before))
        assert champion is not None


def test_datasets_and_models_are_inputs_and_outputs_once(backend: Backend) -> None:
    runs, data = backend.tracker.runs, Dataset("corpus", "e" * 64, "/data/corpus", {"documents": 3}, "evaluation")
    made, used = (runs.start("linked", **{**WHAT, "step": step}) for step in ("register", "evaluate"))
    model = backend.tracker.registry.register(made, "linked", "/e", identity="i", alias="candidate", tags={})
    for _ in range(2):
        runs.log(made, outputs=[model])
        runs.log(used, inputs=[data, model])
    assert backend.read(made).models_out == 1
    assert backend.read(used).models_in == 1
    assert backend.read(used).datasets == [("corpus", "/data/corpus", {"documents": 3}, "evaluation")]


def test_an_outage_is_a_warning_for_runs_and_an_error_for_the_registry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    blocked = tmp_path / "file"
    blocked.write_text("no folder")
    down: list[Tracker] = [
        MlflowTracker(TrackingConfig(uri="http://127.0.0.1:9"), str(tmp_path), CODE),
        JsonTracker(f"json:{blocked}", str(tmp_path), CODE),
    ]
    for tracker in down:
        caplog.clear()
        assert tracker.runs.start("x", **WHAT) is None
        assert "tracking: start failed" in caplog.text
        assert not tracker.runs.points("run", [Point("loss", 1.0, 1, 1)])
        tracker.runs.finish("run", "FINISHED")
        # A file in the place of a folder never becomes one: nobody tries that again.
        with pytest.raises((OperationalError, MissingFileError)):
            tracker.registry.set_alias("net", "champion", 1)
        with pytest.raises((OperationalError, MissingFileError)):
            tracker.registry.register(None, "net", "/a", identity="i", alias="candidate", tags={})
