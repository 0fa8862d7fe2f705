"""Data files of any content: their documents are read, or refused with an error that names the file."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models

from base.errors import DataError
from cherry.data.chat_template import ChatTemplate
from cherry.data.control_tokens import ControlTokens
from cherry.data.corpus import Source
from cherry.job_config import DataConfig

FUZZ = settings(deadline=None, derandomize=True, max_examples=300, suppress_health_check=list(HealthCheck))
ENDINGS = [
    "txt",
    "json",
    "jsonl",
    "ndjson",
    "JSONL",
    "csv",
    "tsv",
    "parquet",
    "gz",
    "jsonl.bz2",
    "csv.xz",
    "zst",
    "bin",
]
FORMATS = ["auto", "text", "jsonl", "chat"]
PACKED = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}

scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner))
KEYS = ["role", "content", "tool_calls", "tools", "weight", "train", "name", "reasoning_content", "images", "prefix"]
messages = st.one_of(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant", "system", "tool"]), "content": st.text(max_size=8) | values},
        optional=dict.fromkeys(KEYS[2:], values),
    ),
    st.dictionaries(st.sampled_from(KEYS), st.sampled_from(["user", "assistant", 0, 1]) | values),
)
records = st.one_of(
    values,
    st.fixed_dictionaries({"text": values}),
    st.fixed_dictionaries({"messages": st.lists(messages | values, max_size=3) | values}, optional={"tools": values}),
)


def dumped(value: Any) -> bytes:
    return json.dumps(value).encode("utf-8", "surrogatepass")


contents = st.one_of(
    st.binary(max_size=200),
    st.lists(records, max_size=4).map(lambda lines: b"\n".join(map(dumped, lines))),
    records.map(dumped),
    st.lists(records, max_size=4).map(dumped),
    st.text(max_size=100).map(lambda text: text.encode("utf-8", "surrogatepass")),
    st.sampled_from(
        [
            b"PAR1",
            b"PAR1" + bytes(20) + b"PAR1",
            b"\x28\xb5\x2f\xfd",
            b"BZh91AY&SY" + bytes(20),
            b"\x1f\x8b\x08\0" + bytes(20),
            b"PK\x03\x04",
            b"\xff\xfe{\0",
            b"a,b\n1",
        ]
    ),
)


@given(content=contents, ending=st.sampled_from(ENDINGS), form=st.sampled_from(FORMATS), pack=st.booleans())
@FUZZ
def test_a_data_file_is_read_or_refused_by_name(content: bytes, ending: str, form: str, pack: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"file.{ending}"
        compress = PACKED.get(ending.rpartition(".")[2])
        path.write_bytes(compress(content) if pack and compress else content)
        try:
            for document in Source(DataConfig(source=str(path), format=form)).documents():
                assert isinstance(document.text, str)
        except DataError as error:
            assert "file." in str(error)


@given(record=st.fixed_dictionaries({"messages": st.lists(messages, max_size=4)}, optional={"tools": values}))
@FUZZ
def test_a_conversation_is_rendered_or_refused_by_line(record: dict[str, Any], tmp_path: Path) -> None:
    template = ChatTemplate(
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function.name }}"
        "{% endfor %}{% endfor %}",
        "the template",
        {},
    )
    control = ControlTokens(Tokenizer(models.BPE()))
    path = tmp_path / "chats.jsonl"
    path.write_bytes(dumped(record))
    try:
        for document in Source(DataConfig(source=str(path), format="chat")).documents():
            assert document.chat is not None
            template.render(document.chat, "chats.jsonl line 1", control)
    except DataError as error:
        assert "chats.jsonl" in str(error)


@pytest.mark.parametrize("ending", ["jsonl", "json", "ndjson"])
@pytest.mark.parametrize("content", [b"[" * 100_000, b'{"a":' * 100_000, b'[{"text": ' + b"[" * 100_000])
def test_deep_nesting_is_refused(tmp_path: Path, ending: str, content: bytes) -> None:
    (path := tmp_path / f"deep.{ending}").write_bytes(content)
    with pytest.raises(DataError, match="deep"):
        list(Source(DataConfig(source=str(path))).documents())
