"""A job whose storage fails for a while, again and again: an object store that is killed, a disk that is full."""

from __future__ import annotations

import errno
import random
import re
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Protocol

from s3fs import S3FileSystem

from base.errors import StorageError, is_retryable_exit_code
from benchmarks.chaos.environment import variables
from benchmarks.chaos.local import LocalCampaign
from benchmarks.chaos.record import Fault
from cherry.checkpoint.naming import newest_checkpoint
from tests.object_stores import KEY, SECRET, SeaweedFS
from tests.supervised import until
from tests.training_job import Job

STORE_KINDS, DISK_KINDS = ("object store killed",), ("disk full",)
_AWAY_S = 0.5, 12.0
_DISK_MIB = 96
_BLOCK = bytes(1 << 16)


class Storage(Protocol):
    """Where the checkpoints of a job are."""

    may_end_job: bool
    """Whether the job may end by the fault, with the code of a transient error, and be started again."""
    checkpoints: str
    """Directory or URI of the checkpoints."""

    def fail(self) -> None:
        """Take the storage away."""

    def mend(self) -> None:
        """Bring it back with what it held."""


class ObjectStore:
    """An S3 server, which is killed outright."""

    may_end_job = True

    def __init__(self, server: SeaweedFS) -> None:
        self._server, self.checkpoints = server, "s3://bucket/store"

    def fail(self) -> None:
        """Kill the server."""
        self._server.kill()

    def mend(self) -> None:
        """Start the server again."""
        self._server.start()


class Disk:
    """A small disk that holds the whole run directory, and that something else fills."""

    may_end_job = False

    def __init__(self, job: Job) -> None:
        self.checkpoints = str(job.directory / "train" / "checkpoints")
        self._filler = job.directory.parent / "filler"

    def fail(self) -> None:
        """Fill it to the last byte."""
        with self._filler.open("ab", buffering=0) as file:
            try:
                while file.write(_BLOCK):
                    pass
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise

    def mend(self) -> None:
        """Free what filled it."""
        self._filler.unlink()


def flags_of(storage: Storage) -> tuple[str, ...]:
    """Flags of a job that saves there."""
    return ("--set", f"checkpoint.directory={storage.checkpoints}", "--set", "checkpoint.every_steps=20")


@contextmanager
def object_store() -> Iterator[ObjectStore]:
    """A store with a bucket called `bucket`, which this process and the programs that it starts find."""
    with tempfile.TemporaryDirectory(prefix="cherry-store-") as name:
        server = SeaweedFS(Path(name))
        given = {"AWS_ENDPOINT_URL": server.url, "AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET}
        try:
            server.start()
            with variables({**given, "AWS_DEFAULT_REGION": "us-east-1", "NO_PROXY": "127.0.0.1"}):
                S3FileSystem().mkdir("bucket")
                yield ObjectStore(server)
        finally:
            server.kill()


@contextmanager
def small_disk(place: Path) -> Iterator[None]:
    """A file system of its own at `place`, which needs root."""
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={_DISK_MIB}m", "tmpfs", str(place)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


class StorageCampaign(LocalCampaign):
    """One job whose storage fails for a while, again and again."""

    def __init__(self, job: Job, storage: Storage, choose: random.Random) -> None:
        super().__init__(job, choose, *flags_of(storage))
        self._storage = storage
        self._start()

    def _meet(self, kind: str) -> Fault:
        committed, at = until(self._newest, "a committed checkpoint"), len(self._log.read_text())
        time.sleep(self._choose.uniform(0.0, 3.0))
        self._storage.fail()
        fault, failed = Fault(kind, "local"), time.time()
        if not self._storage.may_end_job:
            until(lambda: re.search("no space left", self._log.read_text()[at:]), "the word that a save failed")
            fault.detect_s = time.time() - failed
        time.sleep(self._choose.uniform(*_AWAY_S))
        self._storage.mend()
        # A look sees an older one while the job commits two more, which push out the newest that it had listed.
        looks = [self._newest() for _ in range(3)]
        fault.data_lost, before = max(looks) < committed, looks[-1]

        def saved() -> bool:
            if (code := self._code()) is not None:
                ended = f"{code}: {self._log.read_text()[-3000:]}"
                assert self._storage.may_end_job and is_retryable_exit_code(code), ended
                fault.detect_s = fault.detect_s or time.time() - failed
                self._start()
            return self._newest() > before

        until(saved, "the next committed checkpoint")
        fault.recover_s = time.time() - failed
        return fault

    def _code(self) -> int | None:
        assert self._process is not None
        return self._process.poll()

    def _newest(self) -> int:
        """Step of the newest committed checkpoint, once a store that was started again finds its volumes."""

        def found() -> list[str | None]:
            with suppress(StorageError):
                return [newest_checkpoint(self._storage.checkpoints)]
            return []

        (newest,) = until(found, "an answer of the store")
        return 0 if newest is None else int(newest.rpartition("_")[2])
