"""Owns the events of a streamed answer: how they are written, and how they are read back.

It knows nothing of who sends them: the gateway writes, the client and a remote replica's adapter read.
"""

from __future__ import annotations

import json
from typing import Any

from base.errors import ServiceError

DONE = b"data: [DONE]\n\n"


def event(data: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


class EventReader:
    """Reads the lines of one stream. `done` tells a finished stream from one that broke off."""

    def __init__(self) -> None:
        self.done = False

    def read(self, line: str) -> dict[str, Any] | None:
        """The event on this line; `None` for blank lines, comments and the end mark.

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
