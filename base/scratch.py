"""Temporary folders that outlive no crash: one whose owner was killed is removed when the next of its kind is made."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_LOCK = ".lock"


@contextmanager
def scratch_folder(kind: str) -> Iterator[Path]:
    """An empty folder of this process in the system's temporary directory, removed on the way out.

    A lock file beside it, which exists before it does, is held as long as this process lives: so a folder whose lock is
    free has lost its owner, and goes. Programs that this one starts do not hold the lock.

    Args:
        kind: begins the folder's name, like `cherry-agent`.
    """
    parent = Path(tempfile.gettempdir())
    _sweep(parent, kind)
    folder = parent / f"{kind}-{uuid.uuid4().hex}"
    descriptor = os.open(_lock_of(folder), os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        folder.mkdir(mode=0o700)
        yield folder
    finally:
        _remove(folder)
        os.close(descriptor)


def _sweep(parent: Path, kind: str) -> None:
    """Remove the folders of this kind that no living process owns; those of other users stay."""
    for lock in parent.glob(f"{kind}-*{_LOCK}"):
        with suppress(OSError):  # another user's, or gone meanwhile
            descriptor = os.open(lock, os.O_RDWR | os.O_NOFOLLOW)
            try:
                if os.fstat(descriptor).st_uid == os.getuid():
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    _remove(lock.with_suffix(""))
            finally:
                os.close(descriptor)


def _remove(folder: Path) -> None:
    """Remove a folder and its lock file, the folder first: without a lock file it would be taken for another's."""
    shutil.rmtree(folder, ignore_errors=True)
    with suppress(FileNotFoundError):
        os.unlink(_lock_of(folder))


def _lock_of(folder: Path) -> Path:
    return folder.with_name(folder.name + _LOCK)
