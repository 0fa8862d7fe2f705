"""What a run tells while it goes: events in order, a log a step, and errors in words."""

from __future__ import annotations

import json
from pathlib import Path

from base.errors import DataError
from tasks.records.events import EVENTS_FILE, line_of, log_file, write_event, write_log


def test_events_are_lines_in_order(tmp_path: Path) -> None:
    write_event(tmp_path, "data", "started")
    write_event(tmp_path, "data", "finished", seconds=1.5)
    lines = [json.loads(line) for line in (tmp_path / EVENTS_FILE).read_text().splitlines()]
    assert [(line["step"], line["event"]) for line in lines] == [("data", "started"), ("data", "finished")]
    assert lines[1]["seconds"] == 1.5
    assert lines[0]["time"] <= lines[1]["time"]


def test_each_step_has_a_log_and_training_s_moves_with_its_folder(tmp_path: Path) -> None:
    for line in ("one", "two"):
        write_log(tmp_path, "export", line)
    assert (tmp_path / "logs" / "export.log").read_text() == "one\ntwo\n"
    assert log_file(tmp_path, "train") == tmp_path / "train" / "launcher.log"


def test_an_error_is_its_sentence_and_an_interruption_a_word() -> None:
    assert line_of(DataError("line 3 is broken")) == "line 3 is broken"
    assert line_of(RuntimeError("odd")) == "RuntimeError: odd"
    assert line_of(KeyboardInterrupt()) == line_of(SystemExit(1)) == "interrupted"
