"""Which tokenizer and chat template a run takes, and that given weights never get a new one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from base.errors import DataError, MissingFileError
from cherry.data.tokenizer_files import chat_template, default_template, given_files, saved_template, tokenizer_uri
from cherry.job_config import DataConfig
from tests.cherry.data import templates

IDS = {"bos_id": 0, "eos_id": 1}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder as beside weights."""
    templates.tokenizer().save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def config(**options: object) -> DataConfig:
    return DataConfig.model_validate({"format": "chat", **options})


def origin_of(folder: Path, **options: object) -> tuple[str, str]:
    found = chat_template(config(**options), templates.tokenizer(), str(folder / "tokenizer.json"), **IDS)
    return found.source, found.origin


def test_a_tokenizer_is_named_by_its_file_or_its_folder(folder: Path) -> None:
    file = str(folder / "tokenizer.json")
    assert [tokenizer_uri(config(tokenizer=name), None) for name in (file, str(folder), f"{folder}/")] == [file] * 3
    with pytest.raises(MissingFileError, match=r"data\.tokenizer .*/none: no file there"):
        tokenizer_uri(config(tokenizer=str(folder / "none")), None)
    (folder / "empty").mkdir()
    with pytest.raises(MissingFileError, match=r"data\.tokenizer .*/empty: no file there"):
        tokenizer_uri(config(tokenizer=str(folder / "empty")), None)


def test_given_weights_bring_their_tokenizer_or_are_refused(folder: Path, tmp_path: Path) -> None:
    assert tokenizer_uri(config(), None) is None
    assert tokenizer_uri(config(), str(folder)) == str(folder / "tokenizer.json")
    bare = tmp_path / "bare"
    bare.mkdir()
    with pytest.raises(DataError, match="given weights mean nothing under a new tokenizer"):
        tokenizer_uri(config(), str(bare))
    assert tokenizer_uri(config(tokenizer=str(folder)), str(bare)) == str(folder / "tokenizer.json")
    (bare / "tiktoken.model").write_text("x")
    for given, weights in ((config(), str(bare)), (config(tokenizer=str(bare)), None)):
        with pytest.raises(DataError, match=r"holds tiktoken\.model in place of tokenizer\.json.*save_pretrained"):
            tokenizer_uri(given, weights)


def test_the_template_is_the_named_one_else_the_tokenizer_s_else_the_default(folder: Path) -> None:
    assert origin_of(folder)[1] == "the default, like that of DeepSeek-V3"
    beside = folder / "tokenizer_config.json"
    beside.write_text(json.dumps({"chat_template": "one"}))
    assert origin_of(folder)[0] == "one"
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "two"}]
    beside.write_text(json.dumps({"chat_template": named}))
    assert origin_of(folder)[0] == "two"
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": "three"}))
    assert origin_of(folder)[0] == "three"
    (folder / "chat_template.jinja").write_text("four")
    assert origin_of(folder) == ("four", f"the one in {folder}")
    (folder / "own.jinja").write_text("five")
    assert origin_of(folder, chat_template=str(folder / "own.jinja")) == ("five", str(folder / "own.jinja"))


def test_what_is_given_is_part_of_the_data_s_identity(folder: Path) -> None:
    assert given_files(config(), None) == {}
    before = given_files(config(tokenizer=str(folder)), None)
    (folder / "chat_template.jinja").write_text("four")
    after = given_files(config(tokenizer=str(folder)), None)
    assert before.keys() < after.keys()
    assert given_files(config(tokenizer=str(folder), format="jsonl"), None) == before


def test_the_saved_template_is_read_back(folder: Path) -> None:
    default = default_template(templates.tokenizer(), **IDS)
    assert saved_template(str(folder / "none.jinja"), templates.tokenizer(), **IDS) is None
    (folder / "t.jinja").write_text(default.source)
    saved = saved_template(str(folder / "t.jinja"), templates.tokenizer(), **IDS)
    assert saved is not None
    assert saved.source == default.source
