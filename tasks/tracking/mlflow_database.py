"""MLflow's SQLite database: its file, whether it can be written, and the paths of artifacts in a copy of it."""

from __future__ import annotations

import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from urllib.parse import unquote, urlsplit

from base.errors import StorageError, storage_errors
from tasks.files.file_lock import hold_lock
from tasks.files.places import check_writable

ARTIFACTS = "mlartifacts"
"""Folder beside the database that artifacts go to."""
_SCHEME = "sqlite:///"
# MLflow resolves an artifact root to an absolute path when it records it.
_COLUMNS = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "storage_location"),
)


def database_file(uri: str) -> Path | None:
    """File of a SQLite URI; `None` for any other URI, and for a database in memory."""
    path = uri.removeprefix(_SCHEME).partition("?")[0]
    return Path(path).absolute() if uri.startswith(_SCHEME) and path not in ("", ":memory:") else None


def check_database(file: Path) -> None:
    """Check that the database can be written, or made; MLflow would try to open it for minutes.

    Raises:
        StorageError: it or its folder cannot be written, or it is no database; the text says how to go on.
    """
    help_ = (
        "Make it writable, or keep runs elsewhere with runs_directory=PATH (or only their records, tracking.uri=URI)"
    )
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        # SQLite makes its journal beside the database. Permission bits say nothing of a file system's state.
        with tempfile.TemporaryFile(dir=file.parent):
            pass
    except OSError as error:
        raise StorageError(
            f"the folder {file.parent} cannot be written: {error.strerror or error}. {help_}."
        ) from error
    check_writable(file.parent / ARTIFACTS, f"MLflow keeps artifacts there. {help_}.")
    if not file.exists():
        return
    check_writable(file, f"It is MLflow's database. {help_}.")
    try:
        with closing(sqlite3.connect(f"{file.as_uri()}?mode=rw", uri=True, timeout=10.0)) as database:
            database.execute("SELECT count(*) FROM sqlite_master")
    except sqlite3.Error as error:
        raise StorageError(
            f"MLflow's database {file} cannot be read: {error}. Put a copy of it back, or move it away: a new one is "
            "made, without the runs that were recorded in it."
        ) from error


@contextmanager
def alone(file: Path) -> Iterator[None]:
    """Hold a lock that no other process holds for the database; it goes with the process.

    On a file of its own: SQLite drops its locks when a process closes the database, and NFS locks no directory.

    Raises:
        StorageError: the file system has no locks.
    """
    with hold_lock(file.with_name(f"{file.name}.lock")):
        yield


def follow_moved_folder(file: Path) -> str | None:
    """Old folder of the artifacts of a moved or copied database, after pointing its paths at the folder beside it.

    `None` when nothing was moved. Else artifacts of a copy would go to the folder of the original, or make one anew
    where it was.
    """
    here = file.resolve().parent / ARTIFACTS
    if not file.exists() or not file.stat().st_size:
        return None
    with storage_errors(str(file)), _transaction(file) as database:
        there = [uri for (uri,) in database.execute("SELECT DISTINCT artifact_location FROM experiments")]
        for uri in there:
            old = _folder(uri)
            if old is None or old.name != ARTIFACTS or old.resolve() == here:
                continue
            if old.exists() and not here.exists():
                continue  # a database that keeps its artifacts elsewhere on purpose
            for table, column in _COLUMNS:
                database.execute(
                    f"UPDATE {table} SET {column} = ? || substr({column}, ?) WHERE substr({column}, 1, ?) = ?",  # noqa: S608
                    (here.as_uri(), len(uri) + 1, len(uri), uri),
                )
            return str(old)
    return None


def _folder(uri: str | None) -> Path | None:
    """Path of a `file:` URI, or of a plain path; `None` for other schemes."""
    parts = urlsplit(uri or "")
    return Path(unquote(parts.path)) if parts.scheme in ("", "file") and parts.path else None


@contextmanager
def _transaction(file: Path) -> Iterator[sqlite3.Connection]:
    """A transaction on the database; a database without MLflow's tables, or with older ones, is left as it is."""
    with closing(sqlite3.connect(file, timeout=10.0)) as database:
        try:
            with database:
                yield database
        except sqlite3.OperationalError as error:
            if "no such" not in str(error):  # table or column
                raise OSError(f"MLflow's database: {error}") from error
