"""`cherry gc`: what nothing refers to is listed and removed when that is confirmed; everything else stays."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import yaml

from base import storage
from flows.cli import main
from flows.gc_command import find_garbage, remove
from tasks.files.data_store import entries_folder, lock_of, share
from tasks.files.file_lock import hold_lock
from tasks.overrides import resolve, write_resolved
from tasks.tracking.connect import connect

OLD, NEW = "a" * 64, "b" * 64


def fill(directory: str) -> None:
    storage.write_bytes(f"{directory}/weights", b"x" * 1000)
    storage.commit(directory)


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """A runs directory with one run: data in the store, data of before, and an export that was set aside."""
    folder = tmp_path / "runs"
    write_resolved(resolve("configs/tiny.yaml", {"runs_directory": str(folder), "tracking": {"uri": "json:"}}))
    for fingerprint in (OLD, NEW):
        share(folder / "tiny" / "data", fingerprint, fill, say=print)
    fill(str(folder / "tiny" / "export.12345678"))
    fill(str(folder / "tiny" / "export"))
    return folder


def paths(runs: Path) -> list[Path]:
    return sorted(item.path for item in find_garbage(runs).garbage)


def expected(runs: Path) -> list[Path]:
    return [entries_folder(runs) / OLD, runs / "tiny" / "export.12345678"]


def run_main(*arguments: str) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["gc", *arguments])
    assert ended.value.code in (0, None)


def test_nothing_is_removed_before_it_is_confirmed(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_main("--runs-directory", str(runs))
    printed = capsys.readouterr().out
    assert "nothing was removed; `cherry gc --yes` removes these" in printed
    assert all(path.exists() for path in expected(runs))
    run_main("--runs-directory", str(runs), "--yes")
    assert not any(path.exists() for path in expected(runs))
    assert storage.is_committed(str(runs / "tiny" / "data"))
    assert storage.is_committed(str(runs / "tiny" / "export"))
    run_main("--runs-directory", str(runs))
    assert "nothing to remove" in capsys.readouterr().out


def test_what_a_registered_version_or_a_config_names_stays(runs: Path) -> None:
    assert paths(runs) == expected(runs)
    config = resolve("configs/tiny.yaml", {"runs_directory": str(runs), "tracking": {"uri": "json:"}})
    registry = connect(config.tracking, str(runs)).registry
    tags = {"export_fingerprint": "12345678" * 8}
    registry.register(None, "net", "/before/a/move/export", identity="i", alias="candidate", tags=tags)
    survey = find_garbage(runs)
    assert [item.path for item in survey.garbage] == expected(runs)[:1]
    assert survey.kept == {expected(runs)[1]: "net v1 is registered with it"}
    fill(str(runs / "tiny" / "train.12345678"))
    other = runs / "other" / "config.yaml"
    storage.write_bytes(str(other), yaml.dump({"init_from": f"{runs}/tiny/train.12345678/step_4"}).encode())
    assert find_garbage(runs).kept[runs / "tiny" / "train.12345678"] == "the config of other names it"


def test_a_registry_that_does_not_answer_keeps_its_runs_weights(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    away = {"runs_directory": str(runs), "tracking": {"uri": "http://127.0.0.1:9"}}
    write_resolved(resolve("configs/tiny.yaml", away))
    survey = find_garbage(runs)
    assert [item.path for item in survey.garbage] == expected(runs)[:1]
    assert "registry could not be asked" in survey.kept[expected(runs)[1]]


@pytest.fixture
def process() -> Iterator[psutil.Process]:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as started:
        yield psutil.Process(started.pid)
        assert started.stdin is not None
        started.stdin.close()


def test_what_a_live_process_holds_stays(runs: Path, process: psutil.Process) -> None:
    garbage = find_garbage(runs).garbage
    lease = {"pid": process.pid, "created": process.create_time()}
    storage.write_json(str(runs / "tiny" / "lease.json"), lease)
    with hold_lock(lock_of(entries_folder(runs) / OLD)):
        assert paths(runs) == []
        assert [remove(item, runs) for item in garbage] == [False, False]
    assert all(path.exists() for path in expected(runs))


def test_data_that_a_run_linked_meanwhile_is_not_removed(runs: Path) -> None:
    garbage = next(item for item in find_garbage(runs).garbage if item.path.name == OLD)
    (runs / "new").mkdir()
    share(runs / "new" / "data", OLD, fill, say=print)
    assert not remove(garbage, runs)
    assert storage.is_committed(str(runs / "new" / "data"))


def test_links_that_were_set_aside_go_with_what_is_theirs_alone(runs: Path, tmp_path: Path) -> None:
    fill(str(tmp_path / "disk"))
    (runs / "tiny" / "train.12345678").symlink_to(tmp_path / "disk")
    os.replace(runs / "tiny" / "data", runs / "tiny" / "data.12345678")
    run_main("--runs-directory", str(runs), "--yes")
    assert not (tmp_path / "disk").exists()
    assert (entries_folder(runs) / NEW).is_dir()
    assert sorted(path.name for path in (runs / "tiny").glob("*.1*")) == []
    assert paths(runs) == [entries_folder(runs) / NEW]
