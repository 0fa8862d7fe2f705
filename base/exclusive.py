"""Files that are created at most once: of several processes that create one, on any hosts, exactly one succeeds.

A file system has the exclusive create for that, an object store the conditional put. Some stores that speak S3 ignore
the condition and overwrite; `check_exclusive` finds them before anything relies on it.
"""

from __future__ import annotations

import os
import uuid
from typing import Any

from base import storage
from base.errors import ConfigError, StorageError, storage_errors

# Protocols whose fsspec client creates by one conditional request: If-None-Match (s3fs, adlfs) or ifGenerationMatch=0
# (gcsfs). What fsspec itself offers other stores is a look before the write, which two processes both pass.
_CONDITIONAL = frozenset({"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss"})
# Answers to a conditional put: the object is there (s3fs translates only Amazon's own wording of it) ...
_EXISTS = frozenset({"PreconditionFailed", "412"})
# ... or another put of it is under way, and Amazon asks to send this one again.
_CONFLICT = frozenset({"ConditionalRequestConflict", "409"})
_ATTEMPTS = 20
_OTHERWISE = (
    "Use a store that honours it, like Amazon S3, or a directory on a file system that all hosts share "
    "(checkpoint.directory)."
)


def create(uri: str, data: bytes = b"") -> bool:
    """True where this call created the file with `data`; false, without a write, where it was there already.

    Raises:
        ConfigError: storage of this kind has no such operation.
        StorageError: any other failure.
    """
    if storage.is_local(uri):
        with storage_errors(uri):
            return _create_local(storage.local_path(uri), data)
    fs, path = storage.locate(uri)
    _check_protocol(fs, uri)
    for _ in range(_ATTEMPTS):
        try:
            with storage_errors(uri):
                fs.pipe_file(path, data, mode="create")
        except StorageError as error:
            codes = _codes(error.__cause__)
            if codes & _EXISTS or isinstance(error.__cause__, FileExistsError):
                return False
            if not codes & _CONFLICT:
                raise
        else:
            return True
    raise StorageError(f"storage failed at {uri}: other writers of this name kept it busy over {_ATTEMPTS} attempts")


def check_exclusive(directory: str) -> None:
    """Check that `create` excludes other hosts in a directory: a second create of one new name must fail.

    Raises:
        ConfigError: the store overwrites all the same, or has no such operation.
    """
    if storage.is_local(directory):
        return
    uri = storage.join(directory, f"probe-{uuid.uuid4().hex}")
    fs, path = storage.locate(uri)
    _check_protocol(fs, uri)
    try:
        overwritten = create(uri) and create(uri)
    finally:
        with storage_errors(uri):
            if fs.exists(path):
                fs.rm_file(path)
    if overwritten:
        raise ConfigError(
            f"{directory}: this store ignores the condition of a put (If-None-Match: *): two puts that were to create "
            "the same new object both succeeded. Two attempts of a run could then overwrite each other's checkpoints. "
            f"{_OTHERWISE}"
        )


def _create_local(path: str, data: bytes) -> bool:
    """`create` on a file system, through a temporary file and a hard link: no reader sees a part of the data."""
    temporary = f"{path}.{uuid.uuid4().hex}.tmp"
    storage.write_bytes(temporary, data)
    try:
        os.link(temporary, path)
    except FileExistsError:
        return False
    except OSError:  # a file system without hard links
        return _create_in_place(path, data)
    finally:
        os.unlink(temporary)
    return True


def _create_in_place(path: str, data: bytes) -> bool:
    try:
        with open(path, "xb") as handle:
            handle.write(data)
    except FileExistsError:
        return False
    return True


def _check_protocol(fs: Any, uri: str) -> None:
    names = {fs.protocol} if isinstance(fs.protocol, str) else set(fs.protocol)
    if not names & _CONDITIONAL:
        raise ConfigError(
            f"{uri}: storage of this kind ({'/'.join(sorted(names))}) has no conditional put, by which attempts of a "
            f"run on several hosts exclude each other. {_OTHERWISE}"
        )


def _codes(error: BaseException | None) -> set[str]:
    """Error codes and HTTP statuses that an object store's client left in an error and its causes."""
    codes: set[str] = set()
    while error is not None:
        response = getattr(error, "response", None)  # botocore
        detail = response.get("Error", {}) if isinstance(response, dict) else {}
        codes |= {str(value) for value in (detail.get("Code"), getattr(error, "code", None)) if value is not None}
        error = error.__cause__
    return codes
