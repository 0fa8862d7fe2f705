"""Places that cannot be written: told with whose they are, by a user who is not root."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from base.errors import MissingFileError, StorageError
from tasks.files.places import check_writable, staying
from tests.stranger import UID, run_as_stranger

CHECK = """
import sys
from pathlib import Path
from base.errors import StorageError
from tasks.files.places import check_writable
for place in sys.argv[1:]:
    try:
        check_writable(Path(place), "Ask for it.")
    except StorageError as error:
        print(error)
    else:
        print("fine")
"""


def test_a_place_of_somebody_else_is_told_with_both_names(tmp_path: Path) -> None:
    for name in ("own", "theirs", "open"):
        (tmp_path / name).mkdir()
    (tmp_path / "own" / "lock").touch()  # root's, in a folder of the stranger's
    os.chown(tmp_path / "own", UID, UID)
    (tmp_path / "open").chmod(0o777)
    (tmp_path / "theirs" / "closed").mkdir(mode=0o700)
    places = ["own", "own/new/one", "own/lock", "theirs", "theirs/new", "theirs/closed/in", "open/new"]
    done = run_as_stranger([sys.executable, "-c", CHECK, *places], folder=tmp_path)
    whose = f": it is root's, and this process is uid {UID}'s. Ask for it."
    assert done.stdout.splitlines() == [
        "fine",
        "fine",
        f"{tmp_path}/own/lock cannot be written{whose}",
        f"{tmp_path}/theirs cannot be written{whose}",
        f"{tmp_path}/theirs cannot be written{whose}",
        f"{tmp_path}/theirs/closed cannot be written{whose}",
        "fine",
    ], done.stderr


def test_a_file_where_a_directory_is_needed_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    check_writable(tmp_path / "file", "Ask.")
    with pytest.raises(StorageError, match=r"file/run cannot be made: .*file is no directory\. Ask\."):
        check_writable(tmp_path / "file" / "run", "Ask.")


@pytest.mark.parametrize("fails", [True, False])
def test_a_directory_that_is_moved_or_removed_while_it_is_worked_in_is_the_error(tmp_path: Path, fails: bool) -> None:
    for number, change in enumerate(("mv", "rm -r")):
        run, moved = tmp_path / f"run{number}", tmp_path / f"moved{number}"
        run.mkdir()
        (run / "data").touch()
        with pytest.raises(MissingFileError) as caught, staying(run):
            subprocess.run([*change.split(), str(run), *([str(moved)] if change == "mv" else [])], check=True)
            run.mkdir()  # as who writes a log there does
            if fails:
                raise MissingFileError(f"{run}/data does not exist")
        how = f"moved to {moved}" if change == "mv" else "moved or removed"
        assert f"{run}: the run's directory is gone: it was {how} while the run worked in it" in str(caught.value)


def test_an_error_in_a_directory_that_stays_is_its_own(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="its own"), staying(tmp_path):
        raise StorageError("its own")
    with staying(tmp_path / "none"):
        (tmp_path / "none").mkdir()
    with pytest.raises(KeyboardInterrupt), staying(tmp_path / "none"):
        (tmp_path / "none").rmdir()
        raise KeyboardInterrupt
