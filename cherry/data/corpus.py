"""Corpus sources: text files, JSONL, chat JSONL, or the source files of Python's standard library.

A document's id is its path (and line) relative to the source: the same on every machine.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import os
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from base import storage
from base.errors import DataError, MissingFileError
from base.storage import FoundFile
from cherry.job_config import DataConfig

STDLIB = "python-stdlib"
ROLES = ("system", "user", "assistant")
_NOT_THE_LIBRARY = {"site-packages", "dist-packages", "__pycache__"}
_BLOCK_BYTES = 1 << 20


@dataclass(frozen=True)
class Document:
    """One document. `messages` is set for chats only, as (role, content) pairs; `text` then joins their contents."""

    id: str
    text: str
    messages: tuple[tuple[str, str], ...] | None = None


class Source:
    """Documents of `data.source`. They are streamed, so that a corpus need not fit in memory.

    Raises:
        MissingFileError: there is no file at the source.
    """

    def __init__(self, config: DataConfig) -> None:
        self.config = config
        self.files = list_files(config.source)
        self.bytes = sum(file.bytes for file in self.files)
        self.skipped = 0
        """Number of text files that the last pass left out because they are not UTF-8."""
        self._chosen: list[Document] | None = None

    def documents(self) -> Iterator[Document]:
        """Every document that is not blank, ordered by file name and line; each call reads the files again.

        With `max_documents`, the documents with the lowest seeded hash of their id, which are kept in memory.

        Raises:
            DataError: a JSONL line is malformed; the text names file and line.
        """
        config = self.config
        if config.max_documents is None:
            return self._read()
        if self._chosen is None:
            numbered = ((seeded(config.seed, "take", d.id), place, d) for place, d in enumerate(self._read()))
            lowest = heapq.nsmallest(config.max_documents, numbered)
            self._chosen = [document for _, _, document in sorted(lowest, key=lambda item: item[1])]
        return iter(self._chosen)

    def _read(self) -> Iterator[Document]:
        self.skipped = 0
        for file in self.files:
            kind = self.config.format
            if kind == "auto":
                kind = "jsonl" if file.name.endswith(".jsonl") else "text"
            if kind != "text":
                yield from _read_records(file, self.config.text_key, chat=kind == "chat")
                continue
            try:
                text = storage.read_bytes(file.uri).decode("utf-8-sig")
            except UnicodeDecodeError:
                self.skipped += 1
                continue
            if text.strip():
                yield Document(file.name, text)


def list_files(source: str) -> list[FoundFile]:
    """Files of a source, sorted by name.

    Raises:
        MissingFileError: there is no file at the source, or none matches.
    """
    if source == STDLIB:
        return sorted(_library(), key=lambda file: file.name)
    found = storage.find(source)
    if not found:
        raise MissingFileError(f"data.source {source}: no file there. Give a file, a folder, a glob or {STDLIB!r}.")
    return found


def _library() -> Iterator[FoundFile]:
    root = sysconfig.get_path("stdlib")
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in _NOT_THE_LIBRARY]
        for path in (Path(folder, name) for name in names if name.endswith(".py")):
            state = path.stat()
            yield FoundFile(path.relative_to(root).as_posix(), str(path), state.st_size, str(state.st_mtime))


def source_version(source: str) -> str:
    """Fingerprint of a source's file listing: it changes when a file is added, removed or rewritten.

    Raises:
        MissingFileError: there is no file at the source.
    """
    return storage.fingerprint([[file.name, file.bytes, file.version] for file in list_files(source)])


def seeded(seed: int, purpose: str, document_id: str) -> int:
    """Pseudo-random number below 2^64 from a seed, a purpose and a document's id, independent of other documents."""
    return int.from_bytes(hashlib.sha256(f"{purpose}{seed}:{document_id}".encode()).digest()[:8], "big")


def is_heldout(document_id: str, *, seed: int, fraction: float) -> bool:
    """True if a document is held out from training."""
    return seeded(seed, "", document_id) < fraction * 2**64


def sample_texts(documents: Iterable[Document], *, size_bytes: int, seed: int) -> list[str]:
    """Texts of the documents with the lowest seeded hash, at least `size_bytes` in total if there is that much.

    The sample does not depend on the order of the documents.
    """
    heap: list[tuple[int, str, str]] = []
    size = 0
    for document in documents:
        rank = seeded(seed, "sample", document.id)
        if size >= size_bytes and rank > -heap[0][0]:
            continue
        text = document.text[:size_bytes]
        heapq.heappush(heap, (-rank, document.id, text))
        size += len(text.encode())
        while size - (last := len(heap[0][2].encode())) >= size_bytes:
            heapq.heappop(heap)
            size -= last
    return [text for _, _, text in sorted(heap, reverse=True)]


def _lines(handle: BinaryIO) -> Iterator[bytes]:
    rest = b""
    while block := handle.read(_BLOCK_BYTES):
        *lines, rest = (rest + block).split(b"\n")
        yield from lines
    yield rest


def _read_records(file: FoundFile, text_key: str, *, chat: bool) -> Iterator[Document]:
    with storage.open_read(file.uri) as handle:
        for number, line in enumerate(_lines(handle), start=1):
            if line.strip():
                document = _document(line, f"{file.name}:{number}", f"{file.uri} line {number}", text_key, chat=chat)
                if document.text.strip():
                    yield document


def _document(line: bytes, name: str, where: str, text_key: str, *, chat: bool) -> Document:
    try:
        record = json.loads(line)
    except ValueError as error:
        # Not str(error): the decoder's line number is always 1 here.
        reason = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
        raise DataError(f"{where}: not valid JSON ({reason}). Fix or remove the line.") from error
    if not isinstance(record, dict):
        raise DataError(f"{where}: must be a JSON object, got {type(record).__name__}. Fix or remove the line.")
    messages = _messages(record, where) if chat else None
    text = "\n".join(content for _, content in messages) if messages is not None else record.get(text_key)
    if not isinstance(text, str):
        raise DataError(
            f"{where}: must have a string under {text_key!r} (data.text_key), got {text!r:.60}. "
            "Fix or remove the line, or name another key."
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: an unpaired surrogate cannot be encoded ({error}). Fix or remove the line."
        ) from error
    return Document(name, text, messages)


def _messages(record: dict[str, Any], where: str) -> tuple[tuple[str, str], ...]:
    messages = record.get("messages")
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{where}: must have a list of messages under 'messages'. Fix or remove the line.")
    pairs: list[tuple[str, str]] = []
    for message in messages:
        role = message.get("role") if isinstance(message, dict) else None
        content = message.get("content") if isinstance(message, dict) else None
        if role not in ROLES or not isinstance(content, str):
            raise DataError(
                f"{where}: a message must have a role of {', '.join(ROLES)} and a string content, got "
                f"{message!r:.80}. Fix or remove the line."
            )
        pairs.append((role, content))
    if all(role != "assistant" for role, _ in pairs):
        raise DataError(f"{where}: no message has the role assistant, so no token would bear loss. Remove the line.")
    return tuple(pairs)
