"""Owns where documents come from: text files, JSONL, chat JSONL, or the standard library's own sources.

It knows nothing of tokens. A document's id is its path (and line) relative to the source: the same on every machine.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fsspec.core import url_to_fs

from base import storage
from base.errors import DataError, MissingFileError, storage_errors
from cherry.config import DataConfig

STDLIB = "python-stdlib"
_ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Document:
    """One document. `messages` is set for chat only, as (role, content) pairs; `text` is then their contents."""

    id: str
    text: str
    messages: tuple[tuple[str, str], ...] | None = None


def read_documents(config: DataConfig) -> Iterator[Document]:
    """Every non-empty document of the source, in the order of their ids' files.

    Raises:
        MissingFileError: nothing is at the source.
        DataError: a JSONL line is broken; the text names file and line.
    """
    for name, uri in list_files(config.source):
        kind = _kind(name, config.format)
        content = storage.read_bytes(uri)
        if kind == "text":
            text = content.decode("utf-8", errors="replace")
            if text.strip():
                yield Document(name, text)
        else:
            yield from _read_lines(name, uri, content, config.text_key, chat=kind == "chat")


def list_files(source: str) -> list[tuple[str, str]]:
    """(name relative to the source, URI) of each file, sorted by name.

    Raises:
        MissingFileError: nothing is at the source, or no file matches.
    """
    if source == STDLIB:
        root = Path(sysconfig.get_path("stdlib"))
        paths = (path for path in root.rglob("*.py") if not {"site-packages", "__pycache__"} & set(path.parts))
        return sorted((path.relative_to(root).as_posix(), str(path)) for path in paths)
    fs, path = url_to_fs(source)
    with storage_errors(source):
        if any(character in path for character in "*?["):
            found = [str(match) for match in fs.glob(path) if not fs.isdir(match)]
            base = path[: min(path.index(c) for c in "*?[" if c in path)].rsplit("/", 1)[0]
        elif fs.isdir(path):
            found, base = [str(match) for match in fs.find(path)], path
        elif fs.exists(path):
            found, base = [path], path.rsplit("/", 1)[0]
        else:
            found, base = [], path
    if not found:
        raise MissingFileError(f"data.source {source}: no file there. Give a file, a folder, a glob or {STDLIB!r}.")
    return sorted((name[len(base) :].lstrip("/"), str(fs.unstrip_protocol(name))) for name in found)


def is_heldout(document_id: str, *, seed: int, fraction: float) -> bool:
    """Whether a document is kept from training: a hash of its id decides, so its neighbours never matter."""
    number = int.from_bytes(hashlib.sha256(f"{seed}:{document_id}".encode()).digest()[:8], "big")
    return number < fraction * 2**64


def _kind(name: str, wanted: str) -> str:
    if wanted != "auto":
        return wanted
    return "jsonl" if fnmatch.fnmatch(name, "*.jsonl") else "text"


def _read_lines(name: str, uri: str, content: bytes, text_key: str, *, chat: bool) -> Iterator[Document]:
    for number, line in enumerate(content.split(b"\n"), start=1):
        if not line.strip():
            continue
        where = f"{uri} line {number}"
        try:
            record = json.loads(line)
        except ValueError as error:
            raise DataError(f"{where}: not valid JSON ({error}). Mend or remove the line.") from error
        if not isinstance(record, dict):
            raise DataError(f"{where}: must be a JSON object, got {type(record).__name__}")
        if chat:
            messages = _messages(record, where)
            yield Document(f"{name}:{number}", "\n".join(content for _, content in messages), messages)
        else:
            text = record.get(text_key)
            if not isinstance(text, str):
                raise DataError(f"{where}: must have a string under {text_key!r} (data.text_key), got {text!r:.60}")
            if text.strip():
                yield Document(f"{name}:{number}", text)


def _messages(record: dict[str, Any], where: str) -> tuple[tuple[str, str], ...]:
    messages = record.get("messages")
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{where}: must have a list of messages under 'messages'")
    pairs: list[tuple[str, str]] = []
    for message in messages:
        role = message.get("role") if isinstance(message, dict) else None
        content = message.get("content") if isinstance(message, dict) else None
        if role not in _ROLES or not isinstance(content, str):
            raise DataError(f"{where}: a message must have a role of {', '.join(_ROLES)} and a string content")
        pairs.append((role, content))
    if all(role != "assistant" for role, _ in pairs):
        raise DataError(f"{where}: no message is the assistant's, so no token would bear loss")
    return tuple(pairs)
