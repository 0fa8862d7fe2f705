"""Locks between processes, of this host or of others that share the file system; a lock goes with its process."""

from __future__ import annotations

import errno
import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from base.errors import StorageError, storage_errors

# Seconds between two attempts while another process holds a lock: whoever waits can be cancelled between them.
_POLL_S = 0.2
# NFS without its lock service, Lustre without `-o flock`, and others.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EBADF)


@contextmanager
def hold_lock(path: Path, *, on_wait: Callable[[], None] | None = None) -> Iterator[None]:
    """Hold the lock of the file at `path`, which is created; only who holds it may remove it, see `remove_lock`.

    Args:
        on_wait: called once if another process holds the lock.

    Raises:
        MissingFileError: its directory does not exist.
        StorageError: the file system has no locks.
    """
    waiting = False
    handle = _open(path)
    try:
        while not (locked := _try(handle, path)) or _is_removed(handle, path):
            if locked:  # that of a file that its holder has removed meanwhile keeps nobody out
                os.close(handle)
                handle = _open(path)
                continue
            if not waiting and on_wait is not None:
                on_wait()
            waiting = True
            time.sleep(_POLL_S)
        yield
    finally:
        os.close(handle)


@contextmanager
def try_lock(path: Path) -> Iterator[bool]:
    """Whether the lock of the file at `path` was free; it is then held. Raises as `hold_lock` does."""
    handle = _open(path)
    try:
        yield _try(handle, path) and not _is_removed(handle, path)
    finally:
        os.close(handle)


def remove_lock(path: Path) -> None:
    """Remove the file of a lock that this process holds: who waits for it makes a new one."""
    path.unlink(missing_ok=True)


def _open(path: Path) -> int:
    with storage_errors(str(path)):
        return os.open(path, os.O_CREAT | os.O_RDWR, 0o666)


def _is_removed(handle: int, path: Path) -> bool:
    try:
        return not os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return True


def _try(handle: int, path: Path) -> bool:
    with storage_errors(str(path)):
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            raise StorageError(
                f"{path}: its file system does not lock files ({error.strerror}), which keeps two processes from the "
                "same run. Turn its locks on (Lustre: the mount option flock; NFS: the lock service), or keep runs on "
                "another one with runs_directory=PATH."
            ) from error
    return True
