"""Temporary folders: gone at the end, gone after a kill when the next one comes, and never taken from the living."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from base.scratch import scratch_folder

_HOLD = """
import subprocess, sys
from base.scratch import scratch_folder
with scratch_folder("kept") as folder:
    (folder / "deep").mkdir()
    (folder / "deep" / "file").write_text("x")
    if sys.argv[1:]:
        child = subprocess.Popen(["sleep", "60"])
        print(child.pid)
    print(folder, flush=True)
    sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A temporary directory of the test, for this process and for those that it starts."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return tmp_path


def holder(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", _HOLD, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def line_of(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def test_a_folder_is_removed_on_the_way_out_also_of_an_error(temporary: Path) -> None:
    with scratch_folder("kept") as folder:
        assert folder.parent == temporary
        assert (folder.stat().st_mode & 0o777, list(folder.iterdir())) == (0o700, [])
    with pytest.raises(RuntimeError), scratch_folder("kept"):
        raise RuntimeError
    assert list(temporary.iterdir()) == []


def test_the_folder_of_a_killed_process_goes_when_the_next_one_is_made(temporary: Path) -> None:
    with holder() as process:
        folder = Path(line_of(process))
        with scratch_folder("kept"), scratch_folder("kept"):
            assert (folder / "deep" / "file").exists(), "its owner lives"
        process.kill()
    assert folder.exists()
    with scratch_folder("other"):
        assert folder.exists(), "of another kind"
    with scratch_folder("kept") as own:
        assert sorted(temporary.iterdir()) == sorted([own, own.with_name(own.name + ".lock")])


def test_a_child_that_lives_on_does_not_keep_its_folder(temporary: Path) -> None:
    with holder("child") as process:
        child, folder = int(line_of(process)), Path(line_of(process))
        process.kill()
    try:
        with scratch_folder("kept"):
            assert not folder.exists()
    finally:
        subprocess.run(["kill", str(child)], check=True)
