"""Server-sent events: what is encoded is decoded however it is cut, and what is no event of this API is refused."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anything.sse import DONE, EventReader, event
from base.errors import ServiceError

# Every character that str.splitlines ends a line at, and NUL.
LINE_ENDS = "\0\n\r\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029"
TEXT = st.text(st.sampled_from(LINE_ENDS + "aé" + "\ud800\U0001f600") | st.characters(), max_size=8)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=5,
)


def cut(stream: bytes, places: list[int]) -> list[bytes]:
    """The stream in pieces that end at `places`, modulo its length."""
    ends = sorted({place % (len(stream) + 1) for place in places} | {len(stream)})
    return [stream[start:end] for start, end in zip([0, *ends], ends, strict=False)]


@given(
    st.lists(st.dictionaries(TEXT, JSON, max_size=3), max_size=5),
    st.lists(st.integers(0, 10_000), max_size=20),
    st.sampled_from([b"\n", b"\r", b"\r\n"]),
)
def test_a_stream_reads_back_what_was_written(values: list[dict[str, Any]], places: list[int], line_end: bytes) -> None:
    stream = (b"".join(map(event, values)) + DONE).replace(b"\n", line_end)
    reader = EventReader()
    assert [value for piece in cut(stream, places) for value in reader.feed(piece)] == values
    assert reader.done


@given(TEXT)
def test_a_reader_that_ends_lines_elsewhere_still_finds_the_event(text: str) -> None:
    lines = list(httpx.Response(200, content=event({"text": text})).iter_lines())
    assert [json.loads(line.removeprefix("data: ")) for line in lines if line] == [{"text": text}]


def test_an_event_is_one_line_of_utf_8_and_a_blank_one() -> None:
    assert event({"text": "é\n"}) == 'data: {"text":"é\\n"}\n\n'.encode()


@pytest.mark.parametrize("line", ["", ": a comment", "event: ping", "id: 3", "data"])
def test_lines_without_data_are_skipped(line: str) -> None:
    reader = EventReader()
    assert reader.feed(f"{line}\n".encode()) == []
    assert not reader.done


def test_an_event_ends_at_its_blank_line() -> None:
    reader = EventReader()
    assert reader.feed(b'data: {"a":\ndata:1}\n') == []
    assert reader.feed(b"\r\n") == [{"a": 1}]


def test_a_line_feed_of_its_own_after_a_cut_line_end_is_a_blank_line() -> None:
    reader = EventReader()
    assert [reader.feed(piece) for piece in (b'data: {"a":1}\r', b"\n", b"", b"\n")] == [[], [], [], [{"a": 1}]]


def test_only_the_end_mark_completes_a_stream() -> None:
    reader = EventReader()
    reader.feed(b'data: {"finish_reason": "stop"}\n\n')
    assert not reader.done
    assert reader.feed(b"data: [DONE]\n\n") == []
    assert reader.done


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"{", "not JSON.*'{'"),
        (b"[1]", r"not a JSON object.*\[1\]"),
        (b"[" * 100_000, "not JSON"),
        (b'{"a": "\xff"', "not JSON"),
    ],
)
def test_data_that_is_no_object_is_refused(data: bytes, message: str) -> None:
    with pytest.raises(ServiceError, match=message):
        EventReader().feed(b"data: " + data + b"\n\n")


def test_an_event_without_an_end_is_refused() -> None:
    reader = EventReader()
    with pytest.raises(ServiceError, match="more than 16777216 bytes"):
        for _ in range(17):
            reader.feed(b"x" * 2**20)
