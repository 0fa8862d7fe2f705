"""Server-sent events of a streamed answer: encoding for the HTTP API, decoding for the client and the remote engine.

Lines end at CR LF, LF or CR and nowhere else (WHATWG HTML, section 9.2.6). Readers that split as str.splitlines does
also end them at U+0085, U+2028 and U+2029, so these are escaped in what is sent.
"""

from __future__ import annotations

import json
import re
from typing import Any

from base.errors import ServiceError

DONE = b"data: [DONE]\n\n"
# Those below U+0020 are escaped in every JSON.
_LINE_ENDS_OF_OTHERS = {0x85: "\\u0085", 0x2028: "\\u2028", 0x2029: "\\u2029"}
_LINE_END = re.compile(rb"\r\n|\r|\n")
# An event holds a few tokens of text: one that is longer than any answer comes from a server gone wrong.
_MAX_EVENT_BYTES = 16 * 2**20


def json_bytes(data: dict[str, Any]) -> bytes:
    """JSON in UTF-8 on one line, whichever characters a reader takes for the end of a line."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":")).translate(_LINE_ENDS_OF_OTHERS)
    # Only a surrogate without its partner has no UTF-8, and a backslash escape of it is what JSON writes.
    return text.encode("utf-8", "backslashreplace")


def event(data: dict[str, Any]) -> bytes:
    """Bytes of one server-sent event."""
    return b"data: " + json_bytes(data) + b"\n\n"


class EventReader:
    """Decoder of one stream's bytes. `done` is True once the end mark came; before, the stream is incomplete."""

    def __init__(self) -> None:
        self.done = False
        self._line = bytearray()
        self._data: list[str] = []
        self._after_cr = False

    def feed(self, received: bytes) -> list[dict[str, Any]]:
        """Events that these bytes complete, however the stream was cut.

        Raises:
            ServiceError: what came is not an event of this API.
        """
        if not received:
            return []
        ends_in_cr = received.endswith(b"\r")
        if self._after_cr:
            received = received.removeprefix(b"\n")
        self._after_cr = ends_in_cr
        events = []
        *ended, rest = _LINE_END.split(received)
        for part in ended:
            self._line += part
            value = self._read(bytes(self._line))
            self._line.clear()
            if value is not None:
                events.append(value)
        self._line += rest
        if len(self._line) > _MAX_EVENT_BYTES:
            raise ServiceError(f"the server sent an event of more than {_MAX_EVENT_BYTES} bytes")
        return events

    def _read(self, line: bytes) -> dict[str, Any] | None:
        """The event that this line ends, if it is a blank one after lines of data."""
        if line:
            name, _, value = line.partition(b":")
            if name == b"data":
                self._data.append(value.removeprefix(b" ").decode("utf-8", "replace"))
            return None
        if not self._data:
            return None
        data = "\n".join(self._data)
        self._data.clear()
        if data.strip() == "[DONE]":
            self.done = True
            return None
        return _object(data)


def _object(data: str) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ServiceError(f"the server sent an event that is not JSON: {data[:80]!r}") from error
    if not isinstance(value, dict):
        raise ServiceError(f"the server sent an event that is not a JSON object: {data[:80]!r}")
    return value
