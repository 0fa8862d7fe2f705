"""Files by URI, read and written through fsspec, and the marker file that makes a directory valid.

URIs are `str`: a plain path, `file://`, `s3://` or `memory://`. The object store's client takes its address and its
credentials from the environment: AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY. Set
AWS_RESPONSE_CHECKSUM_VALIDATION=when_required for a store that answers a ranged read with the checksum of the whole
object ("Expected checksum ... did not match", seen with rclone 1.75).
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO, cast

from fsspec.core import url_to_fs

from base.errors import ConfigError, MissingFileError, has_credentials, storage_errors, without_credentials

MARKER = "COMMITTED"
_BLOCK_BYTES = 1 << 20
_WILDCARDS = "*?["
# Keys of an entity tag or a time of change in fsspec's file information: object stores, local disks, memory.
_VERSION_KEYS = ("ETag", "mtime", "LastModified", "created")

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


def _locate(uri: str) -> tuple[Any, str]:
    """File system of `uri` and path in it, without a cache of listings: another host may have written since.

    Raises:
        ConfigError: no installed file system takes such a URI, or it holds a password, which logs would keep.
    """
    if has_credentials(uri):
        raise ConfigError(
            f"{without_credentials(uri)}: a URI must not hold a password. Set credentials in the environment "
            "(AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a profile)."
        )
    try:
        fs, path = url_to_fs(uri, use_listings_cache=False)
    except (ImportError, ValueError) as error:
        raise ConfigError(
            f"{uri}: storage of this kind cannot be used: {error}. For s3:// install cherry-framework[s3]."
        ) from error
    return fs, path


def exists(uri: str) -> bool:
    """Whether a file or a directory is at `uri`."""
    fs, path = _locate(uri)
    with storage_errors(uri):
        return bool(fs.exists(path))


@contextmanager
def open_read(uri: str) -> Iterator[BinaryIO]:
    """A seekable binary reader.

    Raises:
        MissingFileError: nothing at `uri`.
    """
    fs, path = _locate(uri)
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
        ValueError: not JSON.
    """
    return json.loads(read_bytes(uri))


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
            fs, path = _locate(uri)
            fs.pipe_file(path, data)


def write_json(uri: str, value: Any) -> None:
    """Write `value` as indented JSON; see `write_bytes`."""
    write_bytes(uri, (json.dumps(value, indent=2, sort_keys=False) + "\n").encode())


def list_names(uri: str) -> list[str]:
    """Sorted names directly inside a directory; empty when there is no such directory."""
    fs, path = _locate(uri)
    with storage_errors(uri):
        if not fs.exists(path):
            return []
        return sorted(str(name).rstrip("/").rsplit("/", 1)[-1] for name in fs.ls(path, detail=False))


def find(uri: str) -> list[FoundFile]:
    """The files at `uri`, sorted by name: one file, a folder's (hidden ones left out), or those that a glob matches.

    Names are relative to the folder, or to the part of a glob before its first wildcard, and so independent
    of where the folder is. Empty when nothing is there.
    """
    fs, path = _locate(uri)
    with storage_errors(uri):
        if fs.isfile(path):
            found, base = {path: fs.info(path)}, path.rpartition("/")[0]
        elif any(character in path for character in _WILDCARDS):
            found = fs.glob(path, detail=True)
            base = path[: min(path.index(c) for c in _WILDCARDS if c in path)].rpartition("/")[0]
        else:
            found, base = (fs.find(path, detail=True) if fs.exists(path) else {}), path
    files = []
    for name, info in found.items():
        relative = str(name).removeprefix(base).lstrip("/")
        hidden = any(part.startswith(".") for part in relative.split("/"))
        if info["type"] == "file" and (not hidden or len(found) == 1):
            where = str(name) if is_local(uri) else str(fs.unstrip_protocol(name))
            version = next((str(info[key]) for key in _VERSION_KEYS if info.get(key)), "")
            files.append(FoundFile(relative, where, int(info["size"]), version))
    return sorted(files, key=lambda file: file.name)


def make_directory(uri: str) -> None:
    """Create a directory and its parents; nothing to do where directories are only prefixes."""
    fs, path = _locate(uri)
    with storage_errors(uri):
        fs.makedirs(path, exist_ok=True)


def remove_tree(uri: str) -> None:
    """Remove a directory, its marker first, so that no reader trusts a partly removed one."""
    fs, path = _locate(uri)
    with storage_errors(uri):
        if fs.exists(join(path, MARKER)):
            fs.rm_file(join(path, MARKER))
        if fs.exists(path):
            fs.rm(path, recursive=True)


def commit(directory: str, record: dict[str, Any] | None = None) -> None:
    """Write the marker that makes `directory` valid. Call it last."""
    write_json(join(directory, MARKER), record or {})


def is_committed(directory: str) -> bool:
    """Whether the directory's marker exists; a directory without it must not be read."""
    return exists(join(directory, MARKER))


def read_commit(directory: str) -> dict[str, Any]:
    """Record that `commit` wrote into the directory's marker.

    Raises:
        MissingFileError: the directory was never committed.
    """
    if not is_committed(directory):
        raise MissingFileError(f"{directory} holds no finished output (no {MARKER} file). Run the step that writes it.")
    return cast(dict[str, Any], read_json(join(directory, MARKER)))


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
