"""Records of data files: JSON lines, a JSON array, CSV, Parquet, plain or compressed, told by content.

A file is opened once for what it is; a file that cannot be read is refused by name.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO, Literal, NamedTuple, cast

from base import storage
from base.errors import DataError
from base.storage import FoundFile

_BLOCK_BYTES = 1 << 20
_PEEK_BYTES = 1 << 16
_COMPRESSED: dict[bytes, Any] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\x00": lzma.open}
_ENDINGS = (".gz", ".bz2", ".xz")
_UNREADABLE = {
    b"\x28\xb5\x2f\xfd": "is compressed by zstd. Decompress it: zstd -d",
    b"PK\x03\x04": "is a zip file. Unpack it: unzip",
    b"ARROW1": "is an Arrow file. Save it as Parquet or JSON lines",
    b"7z\xbc\xaf": "is a 7z file. Unpack it",
    b"\x89HDF": "is an HDF5 file. Save its texts as JSON lines",
}
_JSON_ENDINGS = (".jsonl", ".ndjson", ".json")
_TABLES = {".csv": ",", ".tsv": "\t"}

# `[{"key":`, or an object whose first key stands on a line of its own.
_LIST_OR_SPREAD = re.compile(rb'(\[\s*\{\s*|\{[ \t\r]*\n\s*)"(\\.|[^"\\])*"\s*:')

Kind = Literal["text", "json", "csv", "parquet"]


class Record(NamedTuple):
    """A record: its number in the file (of a line, row or element, from 1), its place for errors, and its value."""

    number: int
    where: str
    value: dict[str, Any]


@contextmanager
def open_plain(file: FoundFile) -> Iterator[BinaryIO]:
    """A reader of a file's content, decompressed.

    Raises:
        DataError: it is compressed in a way that is not read, or damaged.
    """
    with storage.open_read(file.uri) as handle:
        head = handle.read(8)
        handle.seek(0)
        for magic, advice in _UNREADABLE.items():
            if head.startswith(magic):
                raise DataError(f"{file.uri} {advice}.")
        opener = next((opener for magic, opener in _COMPRESSED.items() if head.startswith(magic)), None)
        if opener is None:
            yield handle
            return
        try:
            with opener(handle, "rb") as plain:
                yield cast(BinaryIO, plain)
        except (EOFError, OSError, lzma.LZMAError, zlib.error) as error:
            if _is_storages(error):
                raise
            raise DataError(f"{file.uri}: damaged: {error}. Copy it again.") from error


def _is_storages(error: Exception) -> bool:
    """True for an error of the file's storage; decoders raise OSErrors without a number for content."""
    return isinstance(error, OSError) and error.errno is not None


def kind_of(file: FoundFile, handle: BinaryIO) -> Kind:
    """What a file holds. JSON is told by its first record, whatever the ending; a table of text by its ending."""
    head = handle.read(_PEEK_BYTES)
    handle.seek(0)
    if head.startswith(b"PAR1"):
        return "parquet"
    name = _plain_name(file.name)
    if name.endswith(tuple(_TABLES)):
        return "csv"
    return "json" if name.endswith(_JSON_ENDINGS) or _begins_as_records(head) else "text"


def has_records(name: str) -> bool:
    """Whether a file's name says that it holds records."""
    name = _plain_name(name)
    return name.endswith((*_JSON_ENDINGS, *_TABLES, ".parquet"))


def _plain_name(name: str) -> str:
    """A file's name in lower case, without the ending of its compression."""
    name = name.lower()
    return next((name.removesuffix(ending) for ending in _ENDINGS if name.endswith(ending)), name)


def _begins_as_records(head: bytes) -> bool:
    """Whether the first line is a JSON object, or one over several lines or a list of them begins."""
    content = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if _LIST_OR_SPREAD.match(content):
        return True
    line, ended, _ = content.partition(b"\n")
    if not content.startswith(b"{"):
        return False
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return not ended and line.startswith(b'{"') and len(head) == _PEEK_BYTES


def read_records(file: FoundFile, handle: BinaryIO, kind: Kind) -> Iterator[Record]:
    """Records of an open file.

    Raises:
        DataError: a record is malformed; names file and line.
    """
    if kind == "parquet":
        yield from _parquet(file, handle)
    elif kind == "csv":
        yield from _table(file, handle)
    else:
        yield from _json(file, handle)


def _json(file: FoundFile, handle: BinaryIO) -> Iterator[Record]:
    head = handle.read(_PEEK_BYTES).removeprefix(b"\xef\xbb\xbf").lstrip()
    handle.seek(0)
    if head.startswith(b"[") and not _is_nested_line(head):
        for number, value in enumerate(_parsed(handle.read(), file.uri), start=1):
            yield Record(number, *_checked(value, f"{file.uri} record {number}"))
        return
    for number, line in enumerate(_lines(handle), start=1):
        if line.strip():
            where = f"{file.uri} line {number}"
            if number == 1 and line.rstrip() in (b"{", b"\xef\xbb\xbf{"):
                handle.seek(0)
                yield Record(1, *_checked(_parsed(handle.read(), file.uri), file.uri))
                return
            yield Record(number, *_checked(_parsed(line, where), where))


def _is_nested_line(head: bytes) -> bool:
    """True if a file that begins with a bracket is lines of arrays, not one array of records."""
    return not head[1:].lstrip().startswith((b"{", b"]")) and head[1:].strip() != b""


def _checked(value: Any, where: str) -> tuple[str, dict[str, Any]]:
    if not isinstance(value, dict):
        raise DataError(f"{where}: must be a JSON object, got {type(value).__name__}. Fix or remove the line.")
    return where, value


def _parsed(content: bytes, where: str) -> Any:
    try:
        return json.loads(content)
    except RecursionError as error:
        raise DataError(f"{where}: nested too deeply to be read. Remove the line.") from error
    except ValueError as error:
        # Not str(error): of a line, the decoder's line number is always 1.
        reason = str(error)
        if isinstance(error, json.JSONDecodeError):
            place = f"line {error.lineno} column" if error.lineno > 1 else "column"
            reason = f"{error.msg} at {place} {error.colno}"
        raise DataError(f"{where}: not valid JSON ({reason}). Fix or remove the line.") from error


def _lines(handle: BinaryIO) -> Iterator[bytes]:
    """Lines, in time that is linear in the size of the longest one."""
    begun: list[bytes] = []
    while block := handle.read(_BLOCK_BYTES):
        first, *others = block.split(b"\n")
        begun.append(first)
        if others:
            yield b"".join(begun)
            yield from others[:-1]
            begun = [others[-1]]
    yield b"".join(begun)


def _table(file: FoundFile, handle: BinaryIO) -> Iterator[Record]:
    delimiter = next(sign for ending, sign in _TABLES.items() if _plain_name(file.name).endswith(ending))
    text = io.TextIOWrapper(handle, encoding="utf-8-sig", newline="")
    before = csv.field_size_limit(1 << 31)
    try:
        rows = csv.DictReader(text, delimiter=delimiter, strict=True)
        for number, row in enumerate(rows, start=1):
            where = f"{file.uri} line {rows.line_num}"
            if None in row or None in row.values():
                raise DataError(
                    f"{where}: must have the {len(rows.fieldnames or ())} columns of the header. Correct the line."
                )
            yield Record(number, where, dict(row))
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"{file.uri}: not a table in UTF-8 separated by {delimiter!r}: {error}.") from error
    finally:
        csv.field_size_limit(before)
        text.detach()


def _parquet(file: FoundFile, handle: BinaryIO) -> Iterator[Record]:
    import pyarrow
    from pyarrow import parquet

    try:
        number = 0
        for batch in parquet.ParquetFile(handle).iter_batches():
            for row in batch.to_pylist():
                number += 1
                yield Record(number, f"{file.uri} row {number}", row)
    except (pyarrow.ArrowException, OSError) as error:
        if _is_storages(error):
            raise
        raise DataError(f"{file.uri}: not a whole Parquet file: {error}. Copy it again.") from error
