"""Server-sent events of a streamed answer: encoding for the HTTP API, decoding for the client and the remote engine."""

from __future__ import annotations

import json
from typing import Any

from base.errors import ServiceError

DONE = b"data: [DONE]\n\n"


def event(data: dict[str, Any]) -> bytes:
    """Bytes of one server-sent event."""
    return b"data: " + json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


class EventReader:
    """Decoder of one stream's lines. `done` is True once the end mark came; before, the stream is incomplete."""

    def __init__(self) -> None:
        self.done = False

    def read(self, line: str) -> dict[str, Any] | None:
        """Event on this line; `None` for blank lines, comments and the end mark.

        Raises:
            ServiceError: the line is not an event of this API.
        """
        if not line.startswith("data:"):
            return None
        data = line.removeprefix("data:").strip()
        if data == "[DONE]":
            self.done = True
            return None
        try:
            value = json.loads(data)
        except ValueError as error:
            raise ServiceError(f"the server sent an event that is not JSON: {data[:80]!r}") from error
        if not isinstance(value, dict):
            raise ServiceError(f"the server sent an event that is not a JSON object: {data[:80]!r}")
        return value
