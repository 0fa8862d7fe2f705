"""Files of records: told by what they hold, under any ending and compression, or refused by name."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from base.errors import DataError
from cherry.data.corpus import Source
from cherry.data.records import has_records
from cherry.job_config import DataConfig

LINES = '{"text": "one"}\n{"text": "two, three"}\n'
FORMS: dict[str, bytes] = {
    "lines": LINES.encode(),
    "lines with a mark": b"\xef\xbb\xbf" + LINES.encode(),
    "array": b'[{"text": "one"}, {"text": "two, three"}]',
    "one over lines": json.dumps({"text": "one"}, indent=2).encode(),
    "array over lines": json.dumps([{"text": "one"}, {"text": "two, three"}], indent=2).encode(),
}


def texts(path: Path, **options: object) -> list[str]:
    source = Source(DataConfig.model_validate({"source": str(path), **options}))
    return [document.text for document in source.documents()]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("ending", ["json", "ndjson", "JSONL", "jsonl", "txt", "data"])
def test_json_is_read_as_records_under_any_ending(tmp_path: Path, form: str, ending: str) -> None:
    (tmp_path / f"a.{ending}").write_bytes(FORMS[form])
    assert texts(tmp_path) == ["one", "two, three"][: 1 if form == "one over lines" else 2]


@pytest.mark.parametrize("packed", [gzip.compress, bz2.compress, lzma.compress])
@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.bin"])
def test_compressed_files_are_read(tmp_path: Path, packed: Callable[[bytes], bytes], name: str) -> None:
    (tmp_path / name).write_bytes(packed(LINES.encode()))
    assert texts(tmp_path) == ["one", "two, three"]
    (tmp_path / name).write_bytes(packed(b"plain text"))
    assert texts(tmp_path, format="text") == ["plain text"]


def test_a_compressed_file_that_is_cut_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(LINES.encode() * 99)[:-20])
    with pytest.raises(DataError, match=r"a\.jsonl\.gz: damaged"):
        texts(tmp_path)


@pytest.mark.parametrize(
    ("head", "message"),
    [(b"\x28\xb5\x2f\xfd", "zstd -d"), (b"PK\x03\x04", "zip"), (b"ARROW1", "Parquet")],
)
@pytest.mark.parametrize("form", ["auto", "text", "chat"])
def test_what_cannot_be_read_is_refused_by_name(tmp_path: Path, head: bytes, message: str, form: str) -> None:
    (tmp_path / "a.x").write_bytes(head + b"\x00" * 20)
    with pytest.raises(DataError, match=rf"a\.x .*{message}"):
        texts(tmp_path, format=form)


def test_a_table_s_column_is_the_text(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('\ufefftext,id\n"one\nmore",1\n"two, ""three""",2\n')
    (tmp_path / "b.tsv").write_text("id\ttext\n1\tfour\n")
    assert texts(tmp_path) == ["one\nmore", 'two, "three"', "four"]
    with pytest.raises(DataError, match=r"a\.csv line 3: must have a string under 'body'"):
        texts(tmp_path, text_key="body")
    (tmp_path / "a.csv").write_text("text,id\none\n")
    with pytest.raises(DataError, match=r"a\.csv line 2: must have the 2 columns of the header"):
        texts(tmp_path)


def test_parquet_is_read_row_by_row(tmp_path: Path) -> None:
    parquet.write_table(pyarrow.table({"text": ["one", "two"], "n": [1, 2]}), tmp_path / "part-0")
    assert texts(tmp_path) == ["one", "two"]
    with pytest.raises(DataError, match=r"part-0 row 1: must have a string under 'n'"):
        texts(tmp_path, text_key="n")
    whole = (tmp_path / "part-0").read_bytes()
    (tmp_path / "part-0").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="not a whole Parquet file"):
        texts(tmp_path)


def test_conversations_of_parquet_have_no_keys_that_are_null(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "hi", "name": None}, {"role": "assistant", "content": "yes", "name": None}]
    parquet.write_table(pyarrow.Table.from_pylist([{"messages": messages}]), tmp_path / "a.parquet")
    (document,) = Source(DataConfig(source=str(tmp_path), format="chat")).documents()
    assert document.chat is not None
    assert [sorted(message) for message in document.chat.messages] == [["content", "role"]] * 2


def test_json_without_the_key_is_refused_and_not_taken_as_text(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{\n  "name": "x"\n}')
    with pytest.raises(DataError, match=r"a\.json: must have a string under 'text' .* or set data\.format=text"):
        texts(tmp_path)
    assert texts(tmp_path, format="text") == ['{\n  "name": "x"\n}']
    (tmp_path / "a.json").write_text('{"messages": []}')
    with pytest.raises(DataError, match=r"or set data\.format=chat"):
        texts(tmp_path)


@pytest.mark.parametrize("content", ["[1] see below\nmore", "{x} is a set", "{{ jinja }}", "[link](url)", "{", "[", ""])
def test_text_that_begins_with_a_bracket_is_text(tmp_path: Path, content: str) -> None:
    (tmp_path / "a.txt").write_text(content + "\nend")
    assert texts(tmp_path) == [content + "\nend"]


@pytest.mark.parametrize("bracket", ["[", '{"a":'])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_a_line_that_is_nested_too_deeply_is_named(tmp_path: Path, bracket: str, name: str) -> None:
    (tmp_path / name).write_text('{"text": "one"}\n{"text": ' + bracket * 100_000 + "\n")
    with pytest.raises(DataError, match=r"a\.json.? line 2: nested too deeply"):
        texts(tmp_path)


def test_files_about_a_data_set_are_left_out_and_told(tmp_path: Path) -> None:
    for name in ("README.md", "LICENSE", "dataset_infos.json", "notes.txt"):
        (tmp_path / name).write_text(f"of {name}")
    assert texts(tmp_path, format="text") == ["of LICENSE", "of README.md", "of dataset_infos.json", "of notes.txt"]
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(LINES.encode()))
    source = Source(DataConfig(source=str(tmp_path)))
    assert [d.text for d in source.documents()] == ["one", "two, three", "of notes.txt"]
    assert [file.name for file in source.left_out] == ["LICENSE", "README.md", "dataset_infos.json"]


def test_names_of_records() -> None:
    assert [has_records(name) for name in ("a.JSONL", "a.csv.gz", "a.parquet", "a.py", "README.md")] == [
        True,
        True,
        True,
        False,
        False,
    ]
