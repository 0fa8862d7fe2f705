"""Digests of source files: of what they hold, what they are called, and of nothing beside them."""

from __future__ import annotations

from pathlib import Path

import pytest

from model import code_digest as module
from model.code_digest import code_digest


def test_files_and_folders_count_with_their_names_and_nothing_else_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_PACKAGE", tmp_path)
    (tmp_path / "room").mkdir()
    for name in ("one.py", "room/two.py", "other.py", "room/notes.txt"):
        (tmp_path / name).write_text(name)
    parts = ("one.py", "room")
    before = code_digest(parts)
    (tmp_path / "other.py").write_text("changed")
    (tmp_path / "room" / "notes.txt").write_text("changed")
    assert code_digest(reversed(parts)) == before
    (tmp_path / "room" / "two.py").rename(tmp_path / "room" / "three.py")
    renamed = code_digest(parts)
    (tmp_path / "one.py").write_text("changed")
    assert len({before, renamed, code_digest(parts)}) == 3


def test_the_package_s_own_parts_are_found() -> None:
    assert len({code_digest(["numerics"]), code_digest(["moe.py"]), code_digest([])}) == 3
