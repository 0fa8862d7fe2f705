"""Progress lines: printed, and written to the file that a parent process names."""

from __future__ import annotations

from pathlib import Path

import pytest

from base.json_lines import read_lines
from base.progress import PROGRESS_FILE_VARIABLE, busy, print_progress


def test_progress_is_printed_and_reported_where_someone_asks_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv(PROGRESS_FILE_VARIABLE, raising=False)
    print_progress("alone", 0.5)
    monkeypatch.setenv(PROGRESS_FILE_VARIABLE, str(tmp_path / "progress"))
    print_progress("half", 0.5)
    assert capsys.readouterr().out == "alone\nhalf\n"
    with busy("checkpoint"):
        assert read_lines(tmp_path / "progress")[1:] == [{"busy": "checkpoint"}]
    assert read_lines(tmp_path / "progress")[2:] == [{"busy": None}]
    assert capsys.readouterr().out == ""
