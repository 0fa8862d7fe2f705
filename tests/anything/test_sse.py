"""Server-sent events: what is encoded is decoded, line by line, and what is no event of this API is refused."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anything.sse import DONE, EventReader, event
from base.errors import ServiceError

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(st.characters(exclude_categories=("Cs",))),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab\n\r\u2028", max_size=3), inner, max_size=3),
    max_leaves=5,
)


@given(st.lists(st.dictionaries(st.text("text\n", max_size=5), JSON, max_size=3), max_size=5))
def test_a_stream_reads_back_what_was_written(values: list[dict[str, Any]]) -> None:
    stream = b"".join(map(event, values)) + DONE
    reader = EventReader()
    # The end of a line is a line feed here: text may hold what str.splitlines takes for one.
    read = [reader.read(line) for line in stream.decode().split("\n")]
    assert [value for value in read if value is not None] == values
    assert reader.done


def test_an_event_is_one_line_of_utf_8_and_a_blank_one() -> None:
    assert event({"text": "é\n"}) == 'data: {"text":"é\\n"}\n\n'.encode()


@pytest.mark.parametrize("line", ["", ": a comment", "event: ping", "id: 3"])
def test_lines_without_data_are_skipped(line: str) -> None:
    reader = EventReader()
    assert reader.read(line) is None
    assert not reader.done


def test_only_the_end_mark_completes_a_stream() -> None:
    reader = EventReader()
    reader.read('data: {"finish_reason": "stop"}')
    assert not reader.done
    assert reader.read("data: [DONE]") is None
    assert reader.done


@pytest.mark.parametrize(
    ("line", "message"), [("data: {", "not JSON.*'{'"), ("data: [1]", r"not a JSON object.*\[1\]")]
)
def test_data_that_is_no_object_is_refused(line: str, message: str) -> None:
    with pytest.raises(ServiceError, match=message):
        EventReader().read(line)
