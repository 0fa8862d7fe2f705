"""The store of prepared data: prepared once for all runs, by one process at a time, and reached through links."""

from __future__ import annotations

import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from base import storage
from tasks.files import data_store
from tasks.files.data_store import entries_folder, lock_of, share, stored_entry

FINGERPRINT = "f" * 64


def folder_of(runs: Path, name: str) -> Path:
    (runs / name).mkdir(parents=True, exist_ok=True)
    return runs / name / "data"


class Fill:
    """Preparation of data that counts how often it ran, and in which directories."""

    def __init__(self) -> None:
        self.directories: list[str] = []

    def __call__(self, directory: str) -> None:
        self.directories.append(directory)
        storage.remove_tree(directory)
        storage.write_bytes(f"{directory}/train-00000.bin", b"tokens")
        storage.commit(directory)


def test_two_runs_of_the_same_data_share_it_through_relative_links(tmp_path: Path) -> None:
    fill, said = Fill(), list[str]()
    one, two = folder_of(tmp_path / "runs", "one"), folder_of(tmp_path / "runs", "two")
    for folder in (one, two):
        share(folder, FINGERPRINT, fill, say=said.append)
    entry = entries_folder(tmp_path / "runs") / FINGERPRINT
    assert fill.directories == [str(entry)]
    assert said == [f"prepared before, in {entry}"]
    assert stored_entry(one) == stored_entry(two) == entry
    (tmp_path / "runs").rename(tmp_path / "moved")
    assert (tmp_path / "moved" / "two" / "data" / "train-00000.bin").read_bytes() == b"tokens"
    shutil.copytree(tmp_path / "moved", tmp_path / "copied", symlinks=True)
    shutil.rmtree(tmp_path / "moved")
    share(folder_of(tmp_path / "copied", "three"), FINGERPRINT, fill, say=said.append)
    assert len(fill.directories) == 1


def test_other_data_of_a_run_replaces_the_link_and_not_the_data(tmp_path: Path) -> None:
    fill, folder = Fill(), folder_of(tmp_path, "one")
    for fingerprint in ("a" * 64, "b" * 64):
        share(folder, fingerprint, fill, say=print)
    assert folder.resolve().name == "b" * 64
    assert storage.is_committed(str(entries_folder(tmp_path) / ("a" * 64)))


def test_the_second_of_two_runs_at_once_waits_and_uses_what_the_first_prepared(tmp_path: Path) -> None:
    fill, said = Fill(), list[str]()
    begun, waits = threading.Event(), threading.Event()

    def slow(directory: str) -> None:
        begun.set()
        assert waits.wait(30)
        fill(directory)

    def say(line: str) -> None:
        said.append(line)
        waits.set()

    first = threading.Thread(target=share, args=(folder_of(tmp_path, "one"), FINGERPRINT, slow), kwargs={"say": print})
    first.start()
    assert begun.wait(30)
    share(folder_of(tmp_path, "two"), FINGERPRINT, fill, say=say)
    first.join(30)
    assert len(fill.directories) == 1
    assert said == ["waiting for another run that prepares the same data", f"prepared before, in {fill.directories[0]}"]


KILLED = """
import os, signal, sys
from pathlib import Path
from base import storage
from tasks.files.data_store import share
def fill(directory):
    storage.write_bytes(directory + "/train-00000.bin", b"half")
    os.kill(os.getpid(), signal.SIGKILL)
share(Path(sys.argv[1]), "f" * 64, fill, say=print)
"""


def test_what_a_killed_process_left_is_prepared_again_by_the_next_one(tmp_path: Path) -> None:
    one = folder_of(tmp_path, "one")
    ended = subprocess.run([sys.executable, "-c", KILLED, str(one)], check=False)
    assert ended.returncode == -9
    assert not one.exists()
    assert (entries_folder(tmp_path) / FINGERPRINT / "train-00000.bin").read_bytes() == b"half"
    fill = Fill()
    share(one, FINGERPRINT, fill, say=print)
    assert len(fill.directories) == 1
    assert (one / "train-00000.bin").read_bytes() == b"tokens"


def test_stored_data_that_lost_a_file_is_prepared_again(tmp_path: Path) -> None:
    fill, one = Fill(), folder_of(tmp_path, "one")
    share(one, FINGERPRINT, fill, say=print)
    (one / "train-00000.bin").unlink()
    share(folder_of(tmp_path, "two"), FINGERPRINT, fill, say=print)
    assert len(fill.directories) == 2
    assert (one / "train-00000.bin").exists()


def test_a_link_to_a_place_of_ones_own_is_written_through(tmp_path: Path) -> None:
    place = tmp_path / "disk"
    place.mkdir()
    folder = folder_of(tmp_path / "runs", "one")
    folder.symlink_to(place)
    share(folder, FINGERPRINT, Fill(), say=print)
    assert folder.resolve() == place
    assert (place / "train-00000.bin").exists()
    assert not entries_folder(tmp_path / "runs").exists()


def test_without_links_data_is_prepared_in_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(self: Path, target: str) -> None:
        raise PermissionError("no links on this file system")

    monkeypatch.setattr(data_store.Path, "symlink_to", refused)
    fill, folder = Fill(), folder_of(tmp_path, "one")
    share(folder, FINGERPRINT, fill, say=print)
    assert fill.directories == [str(folder)]
    assert stored_entry(folder) is None


def test_the_time_of_the_last_use_is_that_of_the_lock(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, "one")
    share(folder, FINGERPRINT, Fill(), say=print)
    entry = stored_entry(folder)
    assert entry is not None
    data_store.os.utime(lock_of(entry), (1.0, 1.0))
    data_store.mark_used(folder)
    assert lock_of(entry).stat().st_mtime > 1.0
