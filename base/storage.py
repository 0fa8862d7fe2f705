"""Files by URI, read and written through fsspec, and the marker file that makes a directory valid.

URIs are `str`: a plain path, `file://`, `s3://` or `memory://`. The object store's client takes its address and its
credentials from the environment: AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY. Set
AWS_RESPONSE_CHECKSUM_VALIDATION=when_required for a store that answers a ranged read with the checksum of the whole
object ("Expected checksum ... did not match", seen with rclone 1.75).
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO, cast
from urllib.parse import urlsplit

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from base.errors import ConfigError, MissingFileError, has_credentials, storage_errors, without_credentials

MARKER = "COMMITTED"
_BLOCK_BYTES = 1 << 20
# Files up to this size are committed with their digest, where reading them again costs little: on a local disk.
_DIGEST_BYTES = 1 << 20
_WILDCARDS = "*?["
# Keys of an entity tag or a time of change in fsspec's file information: object stores, local disks, memory.
_VERSION_KEYS = ("ETag", "mtime", "LastModified", "created")

logger = logging.getLogger(__name__)
Progress = Callable[[str, float], None]
"""Callback of long reads and writes: called with a line for people and the fraction done, 0 to 1."""


@dataclass(frozen=True)
class FoundFile:
    """A file listed by `find`: its name relative to the searched folder, its URI, its size and its version."""

    name: str
    uri: str
    bytes: int
    version: str
    """Entity tag or modification time; it changes when the file is rewritten."""


def is_local(uri: str) -> bool:
    """True for a plain path or a `file://` URI."""
    return "://" not in uri or uri.startswith("file://")


def local_path(uri: str) -> str:
    """The path of a local URI. `file://` is stripped, `~` is expanded."""
    return os.path.expanduser(uri.removeprefix("file://"))


def join(uri: str, *parts: str) -> str:
    """URI of `parts` below `uri`, joined by single slashes."""
    return "/".join([uri.rstrip("/"), *(part.strip("/") for part in parts)])


def locate(uri: str) -> tuple[Any, str]:
    """fsspec's file system of `uri` and path in it, without a cache of listings: another host may have written since.

    Raises:
        ConfigError: no installed file system takes such a URI, or it holds a password, which logs would keep.
    """
    if has_credentials(uri):
        raise ConfigError(
            f"{without_credentials(uri)}: a URI must not hold a password. Set credentials in the environment "
            "(AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a profile)."
        )
    if "://" not in uri:  # not by url_to_fs, which takes `::` in a path for a chain of file systems
        return LocalFileSystem(), os.path.abspath(os.path.expanduser(uri))
    try:
        uri.encode()  # what came from a command line may hold bytes of no text
        _ = urlsplit(uri).port if uri.startswith("http") else None  # no number above 65535
        fs, path = url_to_fs(uri, use_listings_cache=False)
    except (ImportError, ValueError) as error:
        raise ConfigError(
            f"{uri}: storage of this kind cannot be used: {error}. For s3:// install cherry-framework[s3]."
        ) from error
    return fs, path


def exists(uri: str) -> bool:
    """Whether a file or a directory is at `uri`."""
    fs, path = locate(uri)
    with storage_errors(uri):
        return bool(fs.exists(path))


def is_file(uri: str) -> bool:
    """Whether a file, not a directory, is at `uri`."""
    fs, path = locate(uri)
    with storage_errors(uri):
        return bool(fs.isfile(path))


def is_link(uri: str) -> bool:
    """Whether a symbolic link is at `uri`; remote storage has none."""
    return is_local(uri) and os.path.islink(local_path(uri))


@contextmanager
def open_read(uri: str) -> Iterator[BinaryIO]:
    """A seekable binary reader.

    Raises:
        MissingFileError: nothing at `uri`.
    """
    fs, path = locate(uri)
    with storage_errors(uri), fs.open(path, "rb") as handle:
        yield cast(BinaryIO, handle)


def read_bytes(uri: str) -> bytes:
    """Content of the file at `uri`."""
    with open_read(uri) as handle:
        return handle.read()


def read_json(uri: str) -> Any:
    """The JSON document at `uri`.

    Raises:
        MissingFileError: nothing at `uri`.
        ValueError: not JSON, or nested deeper than the parser goes.
    """
    data = read_bytes(uri)
    try:
        return json.loads(data)
    except RecursionError as error:
        raise json.JSONDecodeError("nested too deeply", "", 0) from error


def write_bytes(uri: str, data: bytes) -> None:
    """Write a file atomically: a reader sees the old content or the new one, never a part.

    Local files go through a temporary file beside the target and an atomic rename; an object store's put is
    atomic by itself.
    """
    with storage_errors(uri):
        if is_local(uri):
            path = local_path(uri)
            os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
            temporary = f"{path}.{os.getpid()}.{threading.get_ident()}.tmp"
            try:
                with open(temporary, "wb") as handle:
                    handle.write(data)
                    handle.flush()
                    os.fsync(handle.fileno())
                os.replace(temporary, path)
            except BaseException:
                if os.path.exists(temporary):
                    os.unlink(temporary)
                raise
        else:
            fs, path = locate(uri)
            fs.pipe_file(path, data)


def write_json(uri: str, value: Any) -> None:
    """Write `value` as indented JSON; see `write_bytes`."""
    write_bytes(uri, (json.dumps(value, indent=2, sort_keys=False) + "\n").encode())


def list_names(uri: str) -> list[str]:
    """Sorted names directly inside a directory; empty when there is no such directory."""
    fs, path = locate(uri)
    with storage_errors(uri):
        if not fs.exists(path):
            return []
        return sorted(str(name).rstrip("/").rsplit("/", 1)[-1] for name in fs.ls(path, detail=False))


def find(uri: str) -> list[FoundFile]:
    """The files at `uri`, sorted by name: one file, a folder's (hidden ones left out), or those that a glob matches.

    A path that is there is meant as it is written, whatever wildcards it holds; so are a glob's leading folders.

    Names are relative to the folder, or to the part of a glob before its first wildcard, and so independent
    of where the folder is. Empty when nothing is there.
    """
    fs, path = locate(uri)
    with storage_errors(uri):
        if fs.isfile(path):
            found, base = {path: fs.info(path)}, path.rpartition("/")[0]
        elif fs.exists(path):
            found, base = fs.find(path, detail=True), path
        elif any(character in path for character in _WILDCARDS):
            base, pattern = _split_glob(fs, path)
            found = fs.glob(f"{_escaped(base)}/{pattern}", detail=True)
        else:
            found, base = {}, path
    files = []
    for name, info in found.items():
        relative = str(name).removeprefix(base).lstrip("/")
        hidden = any(part.startswith(".") for part in relative.split("/"))
        if info["type"] == "file" and (not hidden or len(found) == 1):
            where = str(name) if is_local(uri) else str(fs.unstrip_protocol(name))
            version = next((str(info[key]) for key in _VERSION_KEYS if info.get(key)), "")
            files.append(FoundFile(relative, where, int(info["size"]), version))
    return sorted(files, key=lambda file: file.name)


def _split_glob(fs: Any, path: str) -> tuple[str, str]:
    """The leading folders of a glob that are there as they are written, or have no wildcard, and the rest of it."""
    parts = path.split("/")
    count = next(i for i, part in enumerate(parts) if any(c in part for c in _WILDCARDS))
    while count < len(parts) - 1 and fs.exists("/".join(parts[: count + 1])):
        count += 1
    return "/".join(parts[:count]), "/".join(parts[count:])


def _escaped(path: str) -> str:
    """`path` as a glob that matches it alone."""
    return "".join(f"[{c}]" if c in _WILDCARDS else c for c in path)


def make_directory(uri: str) -> None:
    """Create a directory and its parents; nothing to do where directories are only prefixes.

    Where the path is a link, the directory that it points at is created.
    """
    fs, path = locate(uri)
    with storage_errors(uri):
        fs.makedirs(os.path.realpath(path) if is_local(uri) else path, exist_ok=True)


def remove_tree(uri: str) -> None:
    """Remove a directory, its marker first, so that no reader trusts a partly removed one.

    A link in its place stays: the directory that it points at is emptied.
    """
    fs, path = locate(uri)
    uncommit(uri)
    with storage_errors(uri):
        if is_local(uri) and os.path.islink(path):
            for child in os.scandir(path) if os.path.isdir(path) else ():
                if child.is_dir(follow_symlinks=False):
                    fs.rm(child.path, recursive=True)
                else:
                    os.unlink(child.path)
        elif fs.exists(path):
            fs.rm(path, recursive=True)


def commit(directory: str, record: dict[str, Any] | None = None) -> None:
    """Write the marker that makes `directory` valid. Call it last.

    The marker names the directory's files under `files`, as `stored_files` returns them, unless `record` does.
    """
    files = {name: state for name, state in stored_files(directory).items() if name != MARKER}
    _sync_names(directory)
    write_json(join(directory, MARKER), {"files": files, **(record or {})})
    _sync_names(directory)


def _sync_names(directory: str) -> None:
    """Have a local disk keep the names in a directory, and its own, so that a power cut takes none of them back."""
    if is_local(directory):
        path = os.path.realpath(local_path(directory))
        with storage_errors(directory):
            for folder in (path, os.path.dirname(path)):
                if os.path.isdir(folder):
                    descriptor = os.open(folder, os.O_RDONLY)
                    try:
                        os.fsync(descriptor)
                    finally:
                        os.close(descriptor)


def uncommit(directory: str) -> None:
    """Remove the marker of `directory`, if it has one: it holds no finished output any more."""
    fs, path = locate(directory)
    with storage_errors(directory):
        if fs.exists(join(path, MARKER)):
            fs.rm_file(join(path, MARKER))


def is_committed(directory: str) -> bool:
    """Whether the directory has a whole marker; a directory without it must not be read."""
    return _marker(directory) is not None


def read_commit(directory: str) -> dict[str, Any]:
    """Record that `commit` wrote into the directory's marker.

    Raises:
        MissingFileError: the directory was never committed, or its marker is empty or cut short.
    """
    record = _marker(directory)
    if record is None:
        raise MissingFileError(
            f"{directory} holds no finished output (no {MARKER} file, or a part of one). Run the step that writes it."
        )
    return record


def _marker(directory: str) -> dict[str, Any] | None:
    """The marker's record; `None` where there is none, or what a power cut left of one."""
    uri = join(directory, MARKER)
    try:
        record = read_json(uri)
    except MissingFileError:
        return None
    except ValueError:
        record = None
    if not isinstance(record, dict):
        logger.warning("%s is empty or cut short: %s does not count as finished", uri, directory)
        return None
    return record


def stored_files(uri: str) -> dict[str, list[Any]]:
    """[bytes, SHA-256] of every file below a directory, by relative name, or of the one file at `uri`, by "".

    The digest is `None` for large files and on remote storage, which is listed once. Empty when nothing is there.
    """
    if is_local(uri):
        base = local_path(uri)
        with storage_errors(uri):
            paths = [os.path.join(folder, name) for folder, _, names in os.walk(base) for name in names]
            paths = [path for path in paths or [base] if os.path.isfile(path)]
            return {("" if path == base else os.path.relpath(path, base)): _file_state(path) for path in sorted(paths)}
    fs, base = locate(uri)
    with storage_errors(uri):
        found = fs.find(base, detail=True)
    return {str(name).removeprefix(base).lstrip("/"): [int(info["size"]), None] for name, info in found.items()}


def _file_state(path: str) -> list[Any]:
    size = os.path.getsize(path)
    return [size, digest(path) if size <= _DIGEST_BYTES else None]


@dataclass(frozen=True)
class Damage:
    """What of a finished output is no longer as it was committed."""

    missing: list[str]
    """Names of files that are gone."""
    changed: list[str]
    """Names of files of another size or, where that was recorded, of other content."""

    def __bool__(self) -> bool:
        return bool(self.missing or self.changed)

    def __str__(self) -> str:
        kinds = (("missing", self.missing), ("changed", self.changed))
        return "; ".join(f"{kind}: {_shortened(names)}" for kind, names in kinds if names)


def _shortened(names: list[str], most: int = 4) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def damage(uri: str, committed: dict[str, list[Any]] | None = None) -> Damage:
    """Difference between what is stored at `uri` and what was committed there; false when all is there.

    A marker of an earlier version, which names no files, counts as whole. Remote storage is listed once: call it on
    one rank only.

    Args:
        committed: the files' states, as `stored_files` returned them; `None` takes them from the directory's marker.
            A file that is no directory then counts as whole.
    """
    stored = stored_files(uri)
    if committed is None:
        record = _marker(uri) if MARKER in stored else None
        if record is None:
            return Damage([] if "" in stored else [MARKER], [])
        committed = record["files"] if isinstance(record.get("files"), dict) else {}
    missing = [name for name in committed if name not in stored]
    changed = [name for name, state in committed.items() if name in stored and _differs(state, stored[name])]
    return Damage(missing, changed)


def _differs(committed: list[Any], stored: list[Any]) -> bool:
    """Whether a file's state is another one; a digest counts where both have one."""
    return committed[0] != stored[0] or (None not in (committed[1], stored[1]) and committed[1] != stored[1])


def digest(uri: str) -> str:
    """SHA-256 of a file, hexadecimal, read in blocks."""
    hasher = hashlib.sha256()
    with open_read(uri) as handle:
        while block := handle.read(_BLOCK_BYTES):
            hasher.update(block)
    return hasher.hexdigest()


def fingerprint(value: Any) -> str:
    """SHA-256 of a JSON value in a canonical form, hexadecimal: the identity of a step's inputs."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
