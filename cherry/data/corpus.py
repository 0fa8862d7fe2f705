"""Corpus sources: text files, records (JSON, CSV, Parquet), or the source files of Python's standard library.

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

from base import storage
from base.errors import DataError, MissingFileError
from base.storage import FoundFile
from cherry.data.chat import Chat, read_chat
from cherry.data.records import Record, has_records, kind_of, open_plain, read_records
from cherry.job_config import DataConfig

STDLIB = "python-stdlib"
_NOT_THE_LIBRARY = {"site-packages", "dist-packages", "__pycache__"}
# Files that a published data set has beside its records.
_ABOUT_THE_DATA = ("readme", "license", "licence", "dataset_infos", "dataset_info", "dataset_dict", "state")


@dataclass(frozen=True)
class Document:
    """One document. `chat` is set for conversations only; `text` then joins the contents of their messages."""

    id: str
    text: str
    chat: Chat | None = None


class Source:
    """Documents of `data.source`. They are streamed, so that a corpus need not fit in memory.

    Raises:
        MissingFileError: there is no file at the source.
    """

    def __init__(self, config: DataConfig) -> None:
        self.config = config
        files = list_files(config.source)
        self.left_out = _about_the_data(files) if config.format != "text" else []
        """Files that describe a data set (README, LICENSE and the like), which are not read."""
        self.files = [file for file in files if file not in self.left_out]
        self.bytes = sum(file.bytes for file in self.files)
        self.skipped = 0
        """Number of text files that the last pass left out because they are not UTF-8."""
        self._chosen: list[Document] | None = None

    def documents(self) -> Iterator[Document]:
        """Every document that is not blank, ordered by file name and line; each call reads the files again.

        With `max_documents`, the documents with the lowest seeded hash of their id, which are kept in memory.

        Raises:
            DataError: a record is malformed, or a file is of a kind that is not read; the text names file and line.
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
            with open_plain(file) as handle:
                kind = "text" if self.config.format == "text" else kind_of(file, handle)
                if kind == "text" and self.config.format != "auto" and self.config.format != "text":
                    kind = "json"
                if kind != "text":
                    for record in read_records(file, handle, kind):
                        document = _document(record, file, self.config)
                        if document.text.strip() or document.chat is not None:
                            yield document
                    continue
                content = handle.read()
            try:
                text = content.decode("utf-8-sig")
            except UnicodeDecodeError:
                self.skipped += 1
                continue
            if text.strip():
                yield Document(file.name, text)


def _about_the_data(files: list[FoundFile]) -> list[FoundFile]:
    """The files of a folder of records that describe them."""
    about = [file for file in files if file.name.rpartition("/")[2].split(".")[0].lower() in _ABOUT_THE_DATA]
    return about if any(has_records(file.name) for file in files if file not in about) else []


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


def _document(record: Record, file: FoundFile, config: DataConfig) -> Document:
    value, where = record.value, record.where
    chat = read_chat(value, where) if config.format == "chat" else None
    text = chat.text if chat is not None else value.get(config.text_key)
    if not isinstance(text, str):
        other = "set data.format=chat" if "messages" in value else "name another key, or set data.format=text"
        raise DataError(
            f"{where}: must have a string under {config.text_key!r} (data.text_key), got {text!r:.60}. "
            f"Fix or remove the record, or {other}."
        )
    try:
        (text if chat is None else json.dumps([chat.messages, chat.context], ensure_ascii=False)).encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: an unpaired surrogate cannot be encoded ({error}). Fix or remove the line."
        ) from error
    except TypeError as error:
        raise DataError(f"{where}: only values that JSON has can be trained on: {error}. Remove the key.") from error
    return Document(f"{file.name}:{record.number}", text, chat)
