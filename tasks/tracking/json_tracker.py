"""A tracker of JSON files, without a server or a database: runs, artifacts, model versions and aliases in one folder.

    runs/<id>.json      name, step, status, parent, params, metrics, tags, inputs, outputs
    runs/<id>.jsonl     a point of a series a line
    runs/<id>/          artifacts
    models/<name>.json  versions and aliases

`tracking.uri: json:` keeps it in `<runs_directory>/tracking`, `json:PATH` in a folder that several of them may share.
Writers of several processes are serialized by a lock file.
"""

from __future__ import annotations

import fcntl
import json
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote, unquote

from base import storage
from base.errors import storage_errors
from tasks.code_version import CodeVersion
from tasks.records.environment import environment_tags, user_name
from tasks.tracking.outages import Outages, best_effort, registry_call
from tasks.tracking.protocol import Dataset, ModelVersion, Point, RunStatus

SCHEME = "json:"
_IDENTITY_TAG = "cherry.identity"


class JsonTracker:
    """`Tracker` over a folder of JSON files."""

    def __init__(self, uri: str, runs_directory: str, code: CodeVersion) -> None:
        path = uri.removeprefix(SCHEME)
        self._folder = Path(path).expanduser() if path else Path(runs_directory) / "tracking"
        self._folder = self._folder.absolute()
        self.outages = Outages()
        self.runs = JsonRuns(self._folder, code, self.outages)
        self.registry = JsonRegistry(self._folder)

    @property
    def address(self) -> str:
        """See `Tracker`."""
        return f"{SCHEME}{self._folder}"

    def connect_early(self) -> None:
        """See `Tracker`; there is nothing to connect to."""

    def open(self, on_outage: Callable[[str], None]) -> None:
        """See `Tracker`."""
        with _locked(self._folder):
            self.outages.report = on_outage

    def page(self, run_id: str | None = None) -> str:
        """See `Tracker`."""
        return f"{self._folder}{self.outages.remark()}" if run_id is None else f"`{self.runs.file(run_id)}`"

    def system_metrics(self, run_id: str | None) -> Callable[[], None] | None:
        """See `Tracker`: this one does not record them."""
        return None


class JsonRuns:
    """`RunTracker` over a folder of JSON files."""

    def __init__(self, folder: Path, code: CodeVersion, outages: Outages) -> None:
        self._folder = folder
        self._code = code
        self.outages = outages

    def file(self, run_id: str) -> Path:
        """The file that holds a run."""
        return self._folder / "runs" / f"{run_id}.json"

    @best_effort
    def start(
        self, name: str, *, parent: str | None, step: str, identity: str, run_key: str, reused: str | None = None
    ) -> str | None:
        """See `RunTracker`."""
        key = {"name": name, "step": step, "identity": identity, "run_key": run_key}
        # The key in the file's name: found again without a look into every run.
        run_id = storage.fingerprint(key)[:32]
        with _locked(self._folder):
            new: dict[str, Any] = {
                **key,
                "parent": parent,
                "started_at": time.time(),
                "params": {},
                "metrics": {},
                "tags": {},
            }
            path = self.file(run_id)
            new |= {"note": None, "inputs": [], "outputs": [], "user": user_name(), "environment": environment_tags()}
            if reused is not None:
                other = storage.read_json(str(self.file(reused)))
                new |= {key: other[key] for key in ("params", "metrics", "inputs", "outputs")}
                new["tags"] = {"cherry.reused_from": reused}
            run = storage.read_json(str(path)) if path.exists() else new
            self._write(run_id, {**run, "status": "RUNNING", "finished_at": None, "code": asdict(self._code)})
        return run_id

    @best_effort
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
        """See `RunTracker`."""
        if run_id is None:
            return
        with self._changing(run_id) as run:
            run["params"] = {**{key: str(value) for key, value in (params or {}).items()}, **run["params"]}
            run["metrics"] |= {key: float(value) for key, value in (metrics or {}).items()}
            run["tags"] |= {key: str(value) for key, value in (tags or {}).items()}
            run["note"] = run["note"] if note is None else note
            for key, entries in (("inputs", inputs), ("outputs", outputs)):
                references = [_reference(entry) for entry in entries]
                run[key] += [reference for reference in references if reference not in run[key]]

    def points(self, run_id: str | None, points: Iterable[Point]) -> bool:
        """See `RunTracker`."""
        return run_id is not None and bool(self._points(run_id, list(points)))

    @best_effort
    def _points(self, run_id: str, points: list[Point]) -> bool:
        with self.file(run_id).with_suffix(".jsonl").open("a") as handle:
            handle.writelines(json.dumps(point._asdict()) + "\n" for point in points)
        with self._changing(run_id) as run:
            run["metrics"] |= {point.name: point.value for point in points}
        return True

    @best_effort
    def artifact(self, run_id: str | None, path: Path, folder: str = "") -> None:
        """See `RunTracker`."""
        if run_id is not None:
            target = self.file(run_id).with_suffix("") / folder
            target.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target / path.name)

    @best_effort
    def finish(self, run_id: str | None, status: RunStatus, *, family: bool = False) -> None:
        """See `RunTracker`."""
        if run_id is None:
            return
        ended = {"status": status, "finished_at": time.time()}
        if not family:
            with self._changing(run_id) as run:
                run |= ended
            return
        for path in sorted(self.file(run_id).parent.glob("*.json")):
            with self._changing(path.stem) as run:
                if run_id in (path.stem, run["parent"]) and run["status"] == "RUNNING":
                    run |= ended

    @contextmanager
    def _changing(self, run_id: str) -> Iterator[dict[str, Any]]:
        """The stored run, written back with what was changed in it."""
        with _locked(self._folder):
            run = storage.read_json(str(self.file(run_id)))
            yield run
            self._write(run_id, run)

    def _write(self, run_id: str, run: Mapping[str, Any]) -> None:
        storage.write_json(str(self.file(run_id)), run)


class JsonRegistry:
    """`ModelRegistry` over a folder of JSON files."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @registry_call
    def register(
        self, run_id: str | None, name: str, uri: str, *, identity: str, alias: str, tags: Mapping[str, str]
    ) -> ModelVersion:
        """See `ModelRegistry`."""
        with self._changing(name) as model:
            same = [version for version in model["versions"] if version["tags"][_IDENTITY_TAG] == identity]
            if not same:
                number = len(model["versions"]) + 1
                same = [{"version": number, "uri": uri, "run_id": run_id, "tags": {_IDENTITY_TAG: identity}}]
                model["versions"] += same
            same[-1]["tags"] |= dict(tags)
            number = int(same[-1]["version"])
            _point_alias(model, alias, number)
        return _version(name, model, number)

    @registry_call
    def version(self, name: str, *, alias: str | None = None, number: int | None = None) -> ModelVersion | None:
        """See `ModelRegistry`."""
        model = self._read(name)
        number = model["aliases"].get(alias) if number is None else number
        return _version(name, model, number) if number in range(1, len(model["versions"]) + 1) else None

    @registry_call
    def versions(self) -> list[ModelVersion]:
        """See `ModelRegistry`."""
        names = [unquote(path.stem) for path in sorted((self._folder / "models").glob("*.json"))]
        models = {name: self._read(name) for name in names}
        return [_version(name, model, 1 + i) for name, model in models.items() for i in range(len(model["versions"]))]

    @registry_call
    def set_alias(self, name: str, alias: str, version: int, *, replacing: int | Literal["any"] | None = "any") -> bool:
        """See `ModelRegistry`."""
        with self._changing(name) as model:
            if replacing != "any" and model["aliases"].get(alias) not in (replacing, version):
                return False
            _point_alias(model, alias, version)
            return True

    @registry_call
    def annotate(
        self,
        version: ModelVersion,
        *,
        tags: Mapping[str, str] | None = None,
        card: str | None = None,
        model_card: str | None = None,
    ) -> None:
        """See `ModelRegistry`."""
        with self._changing(version.name) as model:
            stored = model["versions"][version.version - 1]
            stored["tags"] |= dict(tags or {})
            if card is not None:
                stored["description"] = card
            if model_card is not None:
                model["description"] = model_card

    def _file(self, name: str) -> Path:
        return self._folder / "models" / f"{quote(name, safe='')}.json"

    def _read(self, name: str) -> dict[str, Any]:
        path = self._file(name)
        model: dict[str, Any] = storage.read_json(str(path)) if path.exists() else {"versions": [], "aliases": {}}
        return model

    @contextmanager
    def _changing(self, name: str) -> Iterator[dict[str, Any]]:
        with _locked(self._folder):
            model = self._read(name)
            yield model
            storage.write_json(str(self._file(name)), model)


def _point_alias(model: dict[str, Any], alias: str, number: int) -> None:
    before = model["aliases"].get(alias)
    if before is not None and before != number:
        model["versions"][number - 1]["tags"][f"previous_{alias}"] = str(before)
    model["aliases"][alias] = number


def _version(name: str, model: Mapping[str, Any], number: int) -> ModelVersion:
    stored = model["versions"][number - 1]
    tags = dict(stored["tags"])
    return ModelVersion(name, number, tags.get("uri", stored["uri"]), tags, f"{name}/{number}")


def _reference(entry: Dataset | ModelVersion) -> dict[str, Any]:
    if isinstance(entry, Dataset):
        return {"dataset": entry.name, **{k: v for k, v in asdict(entry).items() if k != "name"}}
    return {"model": entry.name, "version": entry.version}


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the folder's lock; it goes with the process."""
    with storage_errors(str(folder)):
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "lock").open("w") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield
