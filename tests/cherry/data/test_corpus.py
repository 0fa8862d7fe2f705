"""Where documents come from: what is read, in which order, what is refused, and the split that ids alone decide."""

from __future__ import annotations

import json
import sysconfig
from pathlib import Path

import numpy as np
import pytest

from base import storage
from base.errors import DataError, MissingFileError
from cherry.data.corpus import Document, Source, is_heldout, list_files, sample_texts, source_version
from cherry.job_config import DataConfig


def read(source: object, **options: object) -> list[Document]:
    config = DataConfig.model_validate({"source": str(source), **options})
    return list(Source(config).documents())


def write(folder: Path, files: dict[str, str | bytes]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def ids(documents: list[Document]) -> list[str]:
    return [document.id for document in documents]


def test_a_folder_is_read_in_the_order_of_names_whatever_the_disk_says(tmp_path: Path) -> None:
    write(tmp_path, {"b.txt": "two", "a/z.md": "one", "c.jsonl": '{"text": "three"}\n\n{"text": "four"}', "B": "zero"})
    documents = read(tmp_path)
    assert [(d.id, d.text) for d in documents] == [
        ("B", "zero"),
        ("a/z.md", "one"),
        ("b.txt", "two"),
        ("c.jsonl:1", "three"),
        ("c.jsonl:3", "four"),
    ]


def test_ids_do_not_depend_on_where_the_folder_is_or_how_it_is_named(tmp_path: Path) -> None:
    files: dict[str, str | bytes] = {"x/1.txt": "one", "x/2.txt": "two"}
    here, there = write(tmp_path / "here", files), write(tmp_path / "quite/elsewhere", files)
    assert read(here) == read(f"{there}/") == read(f"file://{here}") == read(here / "**/*.txt")
    assert ids(read(here / "x/1.txt")) == ["1.txt"]
    assert ids(read(here / "x/*.txt")) == ["1.txt", "2.txt"]


def test_hidden_files_and_blank_documents_are_left_out(tmp_path: Path) -> None:
    write(tmp_path, {".git/config": "x", ".DS_Store": b"\x00\xff", "blank.txt": " \n\t", "a.txt": "text"})
    write(tmp_path, {"b.jsonl": '{"text": "  "}\n{"text": "more"}'})
    assert ids(read(tmp_path)) == ["a.txt", "b.jsonl:2"]


def test_files_that_are_not_utf8_are_left_out_and_counted(tmp_path: Path) -> None:
    write(tmp_path, {"latin.txt": "café".encode("latin-1"), "marked.txt": "\ufeffgood", "ok.txt": "ü"})
    source = Source(DataConfig(source=str(tmp_path)))
    assert [document.text for document in source.documents()] == ["good", "ü"]
    assert source.skipped == 1
    assert len(list(source.documents())) == 2
    assert source.skipped == 1


def test_the_key_of_the_text_can_be_named_and_the_format_set(tmp_path: Path) -> None:
    write(tmp_path, {"a.json": '{"body": "one", "text": "no"}'})
    assert [d.text for d in read(tmp_path / "a.json", format="jsonl", text_key="body")] == ["one"]
    assert [d.text for d in read(tmp_path / "a.json", format="text")] == ['{"body": "one", "text": "no"}']


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "two"', "not valid JSON"),
        ("[1]", "must be a JSON object, got list"),
        ('{"txt": "two"}', r"must have a string under 'text' \(data.text_key\), got None"),
        ('{"text": 3}', "got 3"),
        ('{"text": "half \\ud800"}', "surrogate"),
        (b'{"text": "caf\xe9"}', "not valid JSON"),
    ],
)
def test_a_broken_line_is_refused_with_its_file_and_number(tmp_path: Path, line: str | bytes, message: str) -> None:
    content = b'{"text": "one"}\n\n' + (line if isinstance(line, bytes) else line.encode()) + b'\n{"text": "four"}\n'
    write(tmp_path, {"a.jsonl": '{"text": "fine"}', "b.jsonl": content})
    with pytest.raises(DataError, match=message) as caught:
        read(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path}/b.jsonl line 3: ")


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"text": "plain"}, "list of messages"),
        ({"messages": []}, "list of messages"),
        ({"messages": ["hi"]}, "a role of system, user, assistant"),
        ({"messages": [{"role": "robot", "content": "hi"}]}, "robot"),
        ({"messages": [{"role": "user", "content": None}]}, "a string content"),
        ({"messages": [{"role": "user", "content": "hi"}]}, "no message has the role assistant"),
    ],
)
def test_a_chat_that_is_none_is_refused(tmp_path: Path, record: object, message: str) -> None:
    write(tmp_path, {"chat.jsonl": json.dumps(record)})
    with pytest.raises(DataError, match=message) as caught:
        read(tmp_path, format="chat")
    assert "chat.jsonl line 1: " in str(caught.value)


def test_lines_longer_than_a_block_are_read_whole(tmp_path: Path) -> None:
    texts = ["é" * 700_000, "short", "x" * 3_000_000]
    write(tmp_path, {"long.jsonl": "\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in texts)})
    assert [document.text for document in read(tmp_path)] == texts


@pytest.mark.parametrize("source", ["nothing", "*.txt", "empty"])
def test_a_source_without_files_is_named(tmp_path: Path, source: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(MissingFileError, match=r"no file there\. Give a file, a folder, a glob or 'python-stdlib'"):
        read(tmp_path / source)


def test_a_file_may_have_a_wildcard_in_its_name(tmp_path: Path) -> None:
    write(tmp_path, {"data[1].txt": "one"})
    assert ids(read(tmp_path / "data[1].txt")) == ["data[1].txt"]


def test_the_standard_library_is_its_own_sources_alone() -> None:
    files = list_files("python-stdlib")
    names = [file.name for file in files]
    assert names == sorted(names)
    assert {"os.py", "json/decoder.py"} <= set(names)
    assert not any("site-packages" in name or "__pycache__" in name or not name.endswith(".py") for name in names)
    assert next(f for f in files if f.name == "os.py").uri == str(Path(sysconfig.get_path("stdlib")) / "os.py")
    assert sum(file.bytes for file in files) > 5_000_000


def test_at_most_so_many_documents_are_taken_in_source_order_and_by_the_seed(tmp_path: Path) -> None:
    write(tmp_path, {f"{number:03d}.txt": f"text {number}" for number in range(100)})
    taken = ids(read(tmp_path, max_documents=10))
    assert len(taken) == 10
    assert taken == sorted(taken)
    assert taken != [f"{number:03d}.txt" for number in range(10)]
    assert taken == ids(read(tmp_path, max_documents=10))
    assert taken != ids(read(tmp_path, max_documents=10, seed=1))
    assert set(taken) < set(ids(read(tmp_path, max_documents=20)))
    assert len(read(tmp_path, max_documents=1000)) == 100


def test_the_split_is_the_id_s_alone_and_as_large_as_asked() -> None:
    names = [f"d{number}" for number in range(20_000)]
    held = {name for name in names if is_heldout(name, seed=0, fraction=0.05)}
    assert abs(len(held) / 20_000 - 0.05) < 4 * np.sqrt(0.05 * 0.95 / 20_000)
    assert held < {name for name in names if is_heldout(name, seed=0, fraction=0.1)}
    other = {name for name in names if is_heldout(name, seed=1, fraction=0.05)}
    assert abs(len(held & other) / 20_000 - 0.0025) < 4 * np.sqrt(0.0025 / 20_000)


def test_a_sample_is_as_large_as_asked_and_the_order_of_documents_does_not_matter() -> None:
    documents = [Document(f"d{number}", f"{number:04d}" * 5) for number in range(500)]
    sample = sample_texts(documents, size_bytes=1000, seed=0)
    assert sum(map(len, sample)) == 1000
    assert sample == sample_texts(reversed(documents), size_bytes=1000, seed=0)
    assert sample != sample_texts(documents, size_bytes=1000, seed=1)
    assert set(sample) < set(sample_texts(documents, size_bytes=3000, seed=0))
    assert len(sample_texts(documents, size_bytes=10**9, seed=0)) == 500
    assert sample_texts([], size_bytes=10, seed=0) == []
    assert [len(text) for text in sample_texts([Document("long", "x" * 10_000)], size_bytes=50, seed=0)] == [50]


def test_a_source_that_changed_has_another_version(tmp_path: Path) -> None:
    write(tmp_path, {"a.txt": "one", "b.txt": "two"})
    before = source_version(str(tmp_path))
    assert source_version(str(tmp_path)) == before
    write(tmp_path, {"b.txt": "three"})
    changed = source_version(str(tmp_path))
    write(tmp_path, {"c.txt": "four"})
    assert len({before, changed, source_version(str(tmp_path))}) == 3
    assert source_version("python-stdlib") == source_version("python-stdlib")


def test_documents_come_from_memory_and_from_an_object_store_as_from_a_disk(s3: str, tmp_path: Path) -> None:
    files: dict[str, str | bytes] = {"x/a.txt": "one", "x/b.jsonl": '{"text": "two"}\n{"text": "three"}', "c.txt": "4"}
    write(tmp_path, files)
    for root in (f"memory://{s3[5:]}/corpus", f"{s3}/corpus"):
        for name, content in files.items():
            storage.write_bytes(f"{root}/{name}", str(content).encode())
        assert read(root) == read(tmp_path)
        assert read(f"{root}/x/*") == read(tmp_path / "x/*")
        assert read(f"{root}/x/a.txt") == read(tmp_path / "x/a.txt")
        before = source_version(root)
        storage.write_bytes(f"{root}/x/a.txt", b"uno")
        assert source_version(root) != before
        storage.write_bytes(f"{root}/x/b.jsonl", b'{"text": "two"}\nbroken')
        with pytest.raises(DataError, match=r"corpus/x/b\.jsonl line 2: not valid JSON"):
            read(root)
        with pytest.raises(MissingFileError):
            read(f"{root}/nothing")
