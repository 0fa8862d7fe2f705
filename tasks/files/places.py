"""Places that a run writes to: whether this user may, asked before anything is computed."""

from __future__ import annotations

import os
import pwd
from pathlib import Path

from base.errors import StorageError


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
