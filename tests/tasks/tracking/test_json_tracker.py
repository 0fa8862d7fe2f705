"""The tracker of JSON files: what its files hold, where they are, and writers that take turns."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest

from tasks.code_version import CodeVersion
from tasks.tracking.json_tracker import JsonTracker
from tasks.tracking.protocol import Point

CODE = CodeVersion("9.9", "d" * 64, None)
KEY: dict[str, Any] = {"parent": None, "step": "train", "identity": "f", "run_key": "k"}


@pytest.mark.parametrize(("uri", "folder"), [("json:", "runs/tracking"), ("json:shared", "shared")])
def test_files_are_in_the_runs_directory_or_where_the_uri_says(
    uri: str, folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tracker = JsonTracker(uri, "runs", CODE)
    assert tracker.address == f"json:{tmp_path / folder}"
    run_id = tracker.runs.start("mine-train", **KEY)
    assert run_id is not None
    path = tmp_path / folder / "runs" / f"{run_id}.json"
    assert tracker.runs.file(run_id) == path
    assert tracker.page(run_id) == f"`{path}`"
    stored = json.loads(path.read_text())
    assert (stored["name"], stored["step"], stored["status"]) == ("mine-train", "train", "RUNNING")


def test_a_point_is_a_line_and_the_last_one_is_the_metric(tmp_path: Path) -> None:
    tracker = JsonTracker("json:", str(tmp_path), CODE)
    run_id = tracker.runs.start("mine-train", **KEY)
    assert tracker.runs.points(run_id, [Point("loss", 2.0, 1, 1000), Point("loss", 1.5, 2, 2000)])
    path = tracker.runs.file(str(run_id))
    lines = [json.loads(line) for line in path.with_suffix(".jsonl").read_text().splitlines()]
    assert lines == [
        {"name": "loss", "value": 2.0, "step": 1, "unix_ms": 1000},
        {"name": "loss", "value": 1.5, "step": 2, "unix_ms": 2000},
    ]
    assert json.loads(path.read_text())["metrics"] == {"loss": 1.5}


@pytest.mark.parametrize("name", ["net", "team/net", "../net"])
def test_a_model_of_any_name_is_a_file_inside_the_folder(name: str, tmp_path: Path) -> None:
    registry = JsonTracker(f"json:{tmp_path}/tracking", "runs", CODE).registry
    registry.register(None, name, "/a", identity="i", alias="candidate", tags={})
    (path,) = (tmp_path / "tracking" / "models").glob("*.json")
    assert json.loads(path.read_text())["aliases"] == {"candidate": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["tracking"]


def test_writers_take_turns_and_lose_nothing(tmp_path: Path) -> None:
    trackers = [JsonTracker("json:", str(tmp_path), CODE) for _ in range(4)]
    run_id = trackers[0].runs.start("mine-train", **KEY)

    def write(number: int) -> None:
        for index in range(10):
            trackers[number].runs.log(run_id, metrics={f"{number}.{index}": 1.0})
            trackers[number].registry.register(
                run_id, "net", "/a", identity=f"{number}.{index}", alias="candidate", tags={}
            )

    threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(json.loads(trackers[0].runs.file(str(run_id)).read_text())["metrics"]) == 40
    assert trackers[0].registry.version("net", number=40) is not None
    assert trackers[0].registry.version("net", number=41) is None
