"""Prepared data of a job whose hosts share no file system: prepared here, and copied to each of them.

It goes through the job's object store, from which hosts read at a time: shards are too large for one machine's ssh
connections. Shards are memory-mapped, so each host keeps a copy, which later starts on it find again.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from base import storage
from base.errors import ConfigError, storage_errors
from cherry.job_config import JobConfig
from cherry.remote.job import Job

DATA_FOLDER = "data"
"""Folder of the prepared data in a run directory."""


def check_apart(config: JobConfig, origin: str) -> None:
    """Check that a job reads and writes nothing that only one of its hosts would have.

    Args:
        origin: what the cluster's file is called.

    Raises:
        ConfigError: it does; names every key.
    """
    if found := "; ".join(map(str, config.problems_apart())):
        raise ConfigError(f"{origin}: its hosts share no file system (ssh.runs_directory), so {found}.")


def publish(job: Job) -> str:
    """URI in the job's object store of its prepared data, which is prepared here and copied there unless that is done.

    Raises:
        ConfigError: the job has no run directory here, or a path that its hosts would not have.
        CherryError: those of `cherry.data.prepare.prepare`, and of storage.
    """
    given = job.run_directory
    if given is None or not storage.is_local(given):
        raise ConfigError(
            f"--run_dir must be a directory here (got {given}): metrics and logs of hosts that share no file system "
            "are carried to it."
        )
    config, directory = job.config(job.nodes), storage.local_path(given)
    check_apart(config, "the cluster file")
    data = storage.join(directory, DATA_FOLDER)
    if not storage.is_committed(data) or not Path(directory, "config.yaml").exists():
        _prepare(job, config, directory)
    target = _beside_checkpoints(config, data)
    if copy_committed(data, target):
        print(f"prepared data is copied to {target}, from where every host takes it", flush=True)
    return target


def _beside_checkpoints(config: JobConfig, data: str) -> str:
    """Where the object store has this data: other data of the same place in the store is never replaced by it."""
    assert config.checkpoint.directory is not None
    content = storage.fingerprint(storage.read_commit(data))[:12]
    return storage.join(config.checkpoint.directory, f"{DATA_FOLDER}-{content}")


def _prepare(job: Job, config: JobConfig, directory: str) -> None:
    """Fill a run directory as the first rank would, where all ranks see it."""
    from cherry.checkpoint.resume_rules import write_config  # torch, which a flow's machine may not have
    from cherry.rank_main import prepared

    prepared(config, directory)
    write_config(config, directory, None)


def copy_committed(source: str, target: str) -> bool:
    """Copy a committed directory between a file system and an object store; false where the target holds it already.

    Args:
        source: path or URI, one of the two local.

    Raises:
        MissingFileError: the source is not committed.
        CherryError: those of storage.
    """
    record = storage.read_commit(source)
    if storage.is_committed(target) and storage.read_commit(target) == record and not storage.damage(target):
        return False
    storage.remove_tree(target)
    _copy(source, target, [name for name in storage.stored_files(source) if name != storage.MARKER])
    _copy(source, target, [storage.MARKER])
    return True


def _copy(source: str, target: str, names: Sequence[str]) -> None:
    """Copy files, several at a time where the store's client does."""
    upwards = storage.is_local(source)
    local, remote = (source, target) if upwards else (target, source)
    fs, base = storage.locate(remote)
    here = [os.path.join(storage.local_path(local), name) for name in names]
    there = [storage.join(base, name) for name in names]
    with storage_errors(target):
        if upwards:
            fs.put(here, there)
            return
        for path in here:
            os.makedirs(os.path.dirname(path), exist_ok=True)
        fs.get(there, here)
        for path in here:  # the marker must not be on the disk before them
            with open(path, "rb") as handle:
                os.fsync(handle.fileno())
