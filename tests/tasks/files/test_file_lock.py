"""Locks between processes: who waits says so, and a lock goes with its process."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from base.errors import MissingFileError, StorageError
from tasks.files.file_lock import hold_lock, remove_lock, try_lock
from tasks.lease import take_lease
from tasks.tracking.mlflow_database import alone

HOLD = "import sys; from pathlib import Path; from tasks.files.file_lock import hold_lock\n"
HOLD += "with hold_lock(Path(sys.argv[1])): print('held', flush=True); input()"


def test_a_lock_is_waited_for_and_goes_with_a_killed_process(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    command = [sys.executable, "-c", HOLD, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with try_lock(path) as free:
            assert not free
        waits, taken = threading.Event(), threading.Event()

        def take() -> None:
            with hold_lock(path, on_wait=waits.set):
                taken.set()

        thread = threading.Thread(target=take)
        thread.start()
        assert waits.wait(30)
        assert not taken.is_set()
        holder.kill()
        thread.join(30)
        assert taken.is_set()
    with try_lock(path) as free:
        assert free


def test_who_waits_for_a_lock_whose_file_is_removed_holds_the_new_one(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    waits, taken, ended = threading.Event(), threading.Event(), threading.Event()

    def take() -> None:
        with hold_lock(path, on_wait=waits.set):
            taken.set()
            ended.wait(30)

    with hold_lock(path):
        thread = threading.Thread(target=take)
        thread.start()
        assert waits.wait(30)
        remove_lock(path)
    assert taken.wait(30)
    with try_lock(path) as free:
        assert not free
    ended.set()
    thread.join(30)


def test_a_lock_in_no_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match="none/lock"), hold_lock(tmp_path / "none" / "lock"):
        pass


def test_a_file_system_without_locks_is_told_with_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No such file system can be mounted here, so the one system call answers as on it."""

    def refuse(handle: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    told = r"lock: its file system does not lock files \(No locks available\).*mount option flock.*runs_directory=PATH"
    with pytest.raises(StorageError, match=told), hold_lock(tmp_path / "lock"):
        pass
    with pytest.raises(StorageError, match=told), try_lock(tmp_path / "lock"):
        pass
    with pytest.raises(StorageError, match=told):
        take_lease(tmp_path / "run")


def test_a_lock_is_taken_as_nfs_asks_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NFS makes an flock a lock of bytes, which only a file that is open for writing has."""
    real, locked = fcntl.flock, []

    def as_nfs(handle: int, operation: int) -> None:
        if fcntl.fcntl(handle, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        real(handle, operation)
        locked.append(os.readlink(f"/proc/self/fd/{handle}"))

    monkeypatch.setattr(fcntl, "flock", as_nfs)
    with alone(tmp_path / "mlflow.db"):
        assert locked == [str(tmp_path / "mlflow.db.lock")]
    with hold_lock(tmp_path / "lock"):
        assert locked[1:] == [str(tmp_path / "lock")]
