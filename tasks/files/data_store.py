"""Prepared data that the runs of one runs directory share: `<runs directory>/_store/data/<fingerprint>`.

A run's `data` is a link to it. Whoever prepares it holds the lock beside it; data counts from its marker on, so what a
killed process left is prepared again by the next one.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from base import storage
from base.errors import storage_errors
from tasks.files.file_lock import hold_lock

STORE = "_store"
"""Folder of the store in the runs directory; no run can have this name."""


def entries_folder(runs_directory: Path) -> Path:
    """Folder of the store's prepared data: a directory and a lock file for each fingerprint."""
    return runs_directory / STORE / "data"


def lock_of(entry: Path) -> Path:
    """Lock of a directory of the store; its time of change is when a run last used the directory."""
    return entry.with_name(f"{entry.name}.lock")


def share(folder: Path, fingerprint: str, fill: Callable[[str], None], *, say: Callable[[str], None]) -> None:
    """Make `folder` of a run a link to the stored data of this fingerprint, prepared first unless it is there.

    Where links cannot be made, and where somebody linked the folder to a place of their own, data is prepared in
    the folder itself.

    Args:
        folder: `<runs directory>/<run>/data`; a directory there is replaced: move one that counts aside first.
        fill: prepares data in the directory that it is given, and commits it.

    Raises:
        CherryError: those of `fill`.
        StorageError: the file system has no locks.
    """
    entry = entries_folder(folder.parent.parent) / fingerprint
    if (folder.is_symlink() and not _is_stored(folder)) or not _can_link(folder):
        fill(str(folder))
        return
    storage.make_directory(str(entry.parent))
    with hold_lock(lock_of(entry), on_wait=lambda: say("waiting for another run that prepares the same data")):
        if storage.damage(str(entry)):
            fill(str(entry))
        else:
            say(f"prepared before, in {entry}")
        _link(folder, entry)
        os.utime(lock_of(entry))


def mark_used(folder: Path) -> None:
    """Record that a run used the stored data that its `folder` is a link to; best effort."""
    entry = stored_entry(folder)
    if entry is not None and lock_of(entry).exists():
        with suppress(OSError):
            os.utime(lock_of(entry))


def stored_entry(folder: Path) -> Path | None:
    """The store's directory that a run's folder is a link to; `None` when it is none."""
    return folder.resolve() if folder.is_symlink() and _is_stored(folder) else None


def _is_stored(link: Path) -> bool:
    # Not by Path.resolve, which raises for links that lead in a circle (before Python 3.13).
    return Path(os.path.realpath(link)).parent == Path(os.path.realpath(entries_folder(link.parent.parent)))


def _can_link(folder: Path) -> bool:
    """Whether the file system has symbolic links."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    probe = folder.with_name(f".link-{uuid.uuid4().hex}")
    try:
        probe.symlink_to(".")
    except OSError:
        return False
    probe.unlink()
    return True


def _link(folder: Path, entry: Path) -> None:
    """Replace `folder` by a relative link, so that the runs directory can be moved."""
    if folder.is_dir() and not folder.is_symlink():
        storage.remove_tree(str(folder))
    link = folder.with_name(f".link-{uuid.uuid4().hex}")
    with storage_errors(str(folder)):
        link.symlink_to(os.path.relpath(entry.resolve(), folder.parent.resolve()))
        os.replace(link, folder)
