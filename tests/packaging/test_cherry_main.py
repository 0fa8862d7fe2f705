"""The check in front of the console scripts."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import cherry_main


def test_the_packages_lie_beside_it() -> None:
    assert cherry_main.shadowed_packages() == {}


def test_a_package_of_another_place_is_found_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "model.py").touch()
    root = str(Path(cherry_main.__file__).parent)
    monkeypatch.delitem(sys.modules, "model", raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *(entry for entry in sys.path if entry != root), root])

    assert cherry_main.shadowed_packages() == {"model": str(tmp_path / "model.py")}
    monkeypatch.setattr(sys, "argv", ["cherry", "--version"])
    with pytest.raises(SystemExit) as ended:
        cherry_main.cherry()
    assert ended.value.code == 11
    assert f"model is {tmp_path / 'model.py'}" in capsys.readouterr().err
