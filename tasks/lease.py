"""Lease of a run directory: at most one flow works in it, whichever host it runs on.

`lease.json` names the holder; `lease.lock` is locked (flock) while a process reads, checks or changes it. The holder
renews the lease by the file's time, so that a lease from a host that died goes stale.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from base import storage
from base.errors import CherryError, DataError, MissingFileError, OperationalError
from base.json_lines import as_record
from tasks.files.file_lock import hold_lock, remove_lock
from tasks.processes.process import Pid, is_alive

_HOST = socket.gethostname()
# Seconds between renewals, and until a lease counts as stale: a slow disk may lose eight renewals.
RENEW_S = 15.0
_STALE_S = 120.0
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Lease:
    """What every lease.json has, but for the token in those of earlier versions."""

    pid: Pid
    created: float
    token: str = ""


def take_lease(run_directory: Path, *, renew_s: float = RENEW_S) -> None:
    """Record that this process uses the run directory, after dropping a lease whose process is gone.

    Args:
        renew_s: seconds between two renewals.

    Raises:
        OperationalError: a live process, here or on another host, is working on the same run.
        StorageError: the directory's file system has no locks.
    """
    path = _lease(run_directory)
    run_directory.mkdir(parents=True, exist_ok=True)
    with locked(run_directory):
        lease = read_lease(run_directory)
        own = lease is not None and lease["pid"] == os.getpid() and _is_here(lease) and _runs(lease)
        if lease is not None and not own and is_held(run_directory):
            raise OperationalError(
                f"{run_directory}: process {lease['pid']} on {lease.get('host', _HOST)} is working on this run. "
                "Wait for it, stop it, or give this run another name (name=...)."
            )
        token = lease["token"] if lease is not None and own else uuid.uuid4().hex
        process = {"host": _HOST, "boot": _boot(), "pid": os.getpid(), "created": psutil.Process().create_time()}
        storage.write_json(str(path), {**process, "token": token})
    if not own:
        threading.Thread(target=_keep_fresh, args=(run_directory, token, renew_s), name="lease", daemon=True).start()


@contextmanager
def locked(run_directory: Path) -> Iterator[None]:
    """Lock the lease: while it is locked no other process takes or drops it, so a holder read as dead stays dead.

    Raises:
        MissingFileError: there is no such directory.
        StorageError: its file system has no locks.
    """
    with hold_lock(run_directory / "lease.lock"):
        yield


def remove_lock_file(directory: Path) -> None:
    """Remove lease.lock, and its directory if nothing else is in it. Call it under `locked`."""
    remove_lock(directory / "lease.lock")
    with suppress(OSError):
        directory.rmdir()


def read_lease(run_directory: Path) -> dict[str, Any] | None:
    """The holder's lease.json; `None` when nobody holds the directory.

    Raises:
        DataError: it is damaged.
    """
    path = _lease(run_directory)
    try:
        lease = storage.read_json(str(path))
    except MissingFileError:
        return None
    except ValueError:
        lease = None
    if (record := as_record(_Lease, lease)) is None:
        raise DataError(
            f"{path}: it is damaged, so nobody can tell which process works on this run. Make sure that none does, and "
            "remove it."
        )
    return {**lease, **asdict(record)}


def is_held(run_directory: Path) -> bool:
    """Whether a live process holds the directory. Call it under `locked`.

    Another host's processes cannot be seen from here: its lease counts until it has not been renewed for a while.
    Both times are the file system's, so the hosts' clocks do not matter.
    """
    lease = read_lease(run_directory)
    if lease is None:
        return False
    if _is_here(lease):
        return _runs(lease)
    lock = run_directory / "lease.lock"
    os.utime(lock)
    # Opened, not only looked at: NFS answers a stat from its cache.
    with _lease(run_directory).open() as handle:
        renewed = os.fstat(handle.fileno()).st_mtime
    return lock.stat().st_mtime - renewed < _STALE_S


def holder(run_directory: Path) -> psutil.Process | None:
    """The live process of this host that holds the directory; `None` where another host's does, or none."""
    lease = read_lease(run_directory)
    if lease is None or not _is_here(lease) or not _runs(lease):
        return None
    try:
        return psutil.Process(lease["pid"])
    except psutil.NoSuchProcess:
        return None


def is_own(run_directory: Path) -> bool:
    """Whether this process holds the directory. Call it under `locked`."""
    lease = read_lease(run_directory)
    return lease is not None and lease["pid"] == os.getpid() and _is_here(lease)


def drop_lease(run_directory: Path) -> None:
    """Remove the lease, whichever process holds it. Call it under `locked`, after `is_held`."""
    _lease(run_directory).unlink(missing_ok=True)


def _keep_fresh(run_directory: Path, token: str, renew_s: float) -> None:
    """Renew the lease until it is released or another process has it; ends with the process."""
    while True:
        time.sleep(renew_s)
        try:
            with locked(run_directory):
                lease = read_lease(run_directory)
                if lease is None or lease.get("token") != token:
                    return
                os.utime(_lease(run_directory))
        except MissingFileError:
            return
        except (OSError, CherryError) as error:
            logger.warning("the lease of %s was not renewed: %s", run_directory, error)


def _is_here(lease: Mapping[str, Any]) -> bool:
    """Whether the holder's pid is one of this host's, and this host has not rebooted since."""
    return (lease.get("host", _HOST), lease.get("boot", _boot())) == (_HOST, _boot())


def _runs(lease: Mapping[str, Any]) -> bool:
    return is_alive(lease["pid"], lease["created"])


def _boot() -> str:
    """Identifier of this boot of the machine."""
    path = Path("/proc/sys/kernel/random/boot_id")
    return path.read_text().strip() if path.exists() else str(int(psutil.boot_time()))


def _lease(run_directory: Path) -> Path:
    return run_directory / "lease.json"
