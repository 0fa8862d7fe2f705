"""Growing files of JSON lines: each finished line once, also over a file that is cut short or rewritten."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from base.json_lines import JsonLinesReader, append_json, append_line, parse_lines, read_last, read_lines


def test_each_finished_line_is_read_once(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    reader = JsonLinesReader(path)
    assert reader.read_new() == []
    append_json(path, {"a": 1})
    with path.open("a") as handle:
        handle.write('{"a": ')
        handle.flush()
        assert reader.read_new() == [{"a": 1}]
        assert reader.read_new() == []
        handle.write("2}\n")
    assert reader.read_new() == [{"a": 2}]
    assert read_lines(path) == [{"a": 1}, {"a": 2}]


@pytest.mark.parametrize("content", [b"", b'{"a": 9}\n', b'{"a": 99999}\n{"b": 2}\n'])
def test_a_rewritten_file_is_noticed_and_read_from_its_start(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "lines.jsonl"
    append_json(path, {"a": 1})
    append_json(path, {"a": 2})
    reader = JsonLinesReader(path)
    assert len(reader.read_new() or []) == 2
    path.write_bytes(content)
    assert reader.read_new() is None
    assert reader.read_new() == parse_lines(content)


def test_what_is_no_json_object_is_left_out() -> None:
    assert parse_lines(b'{"a": 1}\nnot json\n[1]\n\n{"a": ') == [{"a": 1}]


def test_the_last_object_with_a_key_is_found_behind_others_and_a_cut_line(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    assert read_last(path, "step") is None
    long = {"step": 1, "load": [0.5] * 100_000}
    path.write_text(json.dumps(long) + '\n{"note": 1}\n{"step": 2')
    assert read_last(path, "step") == long
    assert read_last(path, "other") is None


def test_a_device_that_takes_nothing_costs_the_line_and_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    append_line(Path("/dev/full"), "lost")
    assert "/dev/full: a line is lost" in caplog.text
