"""Places that a run writes to: whether this user may, asked before anything is computed, and whether they stay."""

from __future__ import annotations

import os
import pwd
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from base.errors import MissingFileError, StorageError


def check_writable(place: Path, advice: str) -> None:
    """Check that a file or directory can be written, or that it can be made where it does not exist yet.

    Args:
        advice: what a person does about it, as a sentence.

    Raises:
        StorageError: it cannot; the text names whose it is.
    """
    existing = next(one for one in (place.absolute(), *place.absolute().parents) if os.path.lexists(one))
    is_directory = existing.is_dir()
    if existing != place.absolute() and not is_directory:
        raise StorageError(f"{place} cannot be made: {existing} is no directory. {advice}")
    if not os.access(existing, os.W_OK | os.X_OK if is_directory else os.W_OK):
        raise StorageError(f"{existing} cannot be written{_whose(existing)}. {advice}")


def _whose(path: Path) -> str:
    """Owner and user in words, where they differ; a place of one's own has wrong permission bits, or is read-only."""
    owner = path.lstat().st_uid
    return "" if owner == os.geteuid() else f": it is {_name(owner)}'s, and this process is {_name(os.geteuid())}'s"


def _name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:  # as in many containers
        return f"uid {uid}"


@contextmanager
def staying(run_directory: Path) -> Iterator[None]:
    """Context of work in a run directory, whose error, once that is moved or removed, is this and not what missed it.

    Raises:
        MissingFileError: it is gone; what was written there since is in another directory of the same name.
    """
    try:
        handle = os.open(run_directory, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:  # there is none yet, or none that can be read
        yield
        return
    try:
        yield
    except Exception as error:
        if _is_gone(run_directory, handle):
            raise _gone(run_directory, handle) from error
        raise
    else:
        if _is_gone(run_directory, handle):
            raise _gone(run_directory, handle)
    finally:
        os.close(handle)


def _is_gone(directory: Path, handle: int) -> bool:
    try:
        return not os.path.samestat(os.stat(directory), os.fstat(handle))
    except FileNotFoundError:
        return True
    except OSError:  # a file system that does not answer now is no news of the directory
        return False


def _gone(directory: Path, handle: int) -> MissingFileError:
    """The error of a directory that is another one now, or none; with its new place, where the system tells it."""
    try:
        moved_to = Path(os.readlink(f"/proc/self/fd/{handle}"))
    except OSError:
        moved_to = directory
    is_elsewhere = moved_to != directory.absolute() and moved_to.is_dir()
    how = f"moved to {moved_to}" if is_elsewhere else "moved or removed"
    return MissingFileError(
        f"{directory}: the run's directory is gone: it was {how} while the run worked in it. Put it back, in place of "
        "what was written here since, and start the same command again."
    )
