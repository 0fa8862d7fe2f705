"""Files of JSON objects, one a line, that one process appends to while others read: metrics, events, progress.

A line is complete once its newline is written. Lines that are no JSON objects (cut short by a kill) are left out;
`as_record` tells those whose fields a disk or a hand has damaged.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from pydantic import TypeAdapter

logger = logging.getLogger(__name__)
_R = TypeVar("_R")
# Enough for some hundred lines; a line with the load of every expert of a large model is longer.
_TAIL_BYTES = 1 << 16


class JsonLinesReader:
    """Reads a growing file from where the last call ended.

    Args:
        offset: bytes to leave out at the beginning; it must be the end of a line.
    """

    def __init__(self, path: Path, offset: int = 0) -> None:
        self.path = path
        self._offset = offset

    def read_new(self) -> list[dict[str, Any]] | None:
        """Objects of the lines that were finished since the last call; empty when there is no file yet.

        `None` when the file was rewritten meanwhile, so that the last call's offset no longer ends a line: the next
        call begins at the start of the file.
        """
        try:
            with self.path.open("rb") as handle:
                handle.seek(max(0, self._offset - 1))
                content = handle.read()
        except (FileNotFoundError, IsADirectoryError):
            return []
        if self._offset:
            if not content.startswith(b"\n"):
                self._offset = 0
                return None
            content = content[1:]
        finished = _finished_lines(content)
        self._offset += len(finished)
        return parse_lines(finished)


def from_the_end(path: Path) -> JsonLinesReader:
    """A reader of what is appended from now on; the file need not be there yet."""
    return JsonLinesReader(path, path.stat().st_size if path.exists() else 0)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Objects of all finished lines; empty when there is no file."""
    return JsonLinesReader(path).read_new() or []


def read_last(
    path: Path, key: str, *, accept: Callable[[dict[str, Any]], bool] = lambda _: True
) -> dict[str, Any] | None:
    """The last finished line's object that has `key` and is accepted, read from the end of the file; else `None`."""
    if not path.is_file():
        return None
    with path.open("rb") as handle:
        size = handle.seek(0, os.SEEK_END)
        tail = _TAIL_BYTES
        while True:
            handle.seek(max(0, size - tail))
            finished = _finished_lines(handle.read(min(size, tail)))
            found = next(
                (record for record in reversed(parse_lines(finished)) if key in record and accept(record)), None
            )
            if found is not None or tail >= size:
                return found
            tail *= 4


def parse_lines(content: bytes) -> list[dict[str, Any]]:
    """The JSON objects among the lines of `content`, the last one with or without its newline."""
    records = []
    for line in content.split(b"\n"):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):  # the parser does not go as deep as anything can be nested
            continue
        if isinstance(record, dict):
            records.append(record)
    return records


def as_record(kind: type[_R], values: object) -> _R | None:
    """The record of a dataclass that JSON values hold; `None` where a field is missing, of another type, or not finite.

    Keys that the dataclass does not have, as those of another version, are left out.
    """
    try:
        record: _R = _adapter(kind).validate_json(json.dumps(values, allow_nan=False))  # type: ignore[arg-type]
        return record
    except (ValueError, RecursionError):
        return None


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    from pydantic import TypeAdapter  # which `cherry --help` does without

    return TypeAdapter(kind)


def append_json(path: Path, record: Mapping[str, Any], *, most_bytes: int | None = None) -> None:
    """Append one object as a line; best effort, see `append_line`."""
    append_line(path, json.dumps(record), most_bytes=most_bytes)


def append_line(path: Path, line: str, *, most_bytes: int | None = None) -> None:
    """Append a line in full, or nothing where storage fails.

    Best effort: on a full disk the line is lost with a warning in the log, and the caller's work continues.

    Args:
        most_bytes: a file that has reached this size becomes `<name>.1`, in place of the one before it.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if most_bytes is not None and path.exists() and path.stat().st_size >= most_bytes:
            path.replace(older_part(path))
        with path.open("ab", buffering=0) as handle:
            before, data = handle.tell(), f"{line}\n".encode()
            if handle.write(data) != len(data):
                handle.truncate(before)
    except OSError as error:
        logger.warning("%s: a line is lost: %s", path, error)


def older_part(path: Path) -> Path:
    """Where the lines before those of a bounded file are; see `append_line`."""
    return path.with_name(f"{path.name}.1")


def _finished_lines(content: bytes) -> bytes:
    return content[: content.rfind(b"\n") + 1]
