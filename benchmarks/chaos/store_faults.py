"""A job whose checkpoints are in an object store, which is killed outright and started again."""

from __future__ import annotations

import os
import random
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from s3fs import S3FileSystem

from base.errors import StorageError, is_retryable_exit_code
from benchmarks.chaos.record import Fault
from benchmarks.chaos.save_faults import CONSTANT, RANKS, finish
from cherry.checkpoint.naming import newest_checkpoint
from tests.object_stores import KEY, SECRET, SeaweedFS
from tests.supervised import until
from tests.training_job import ROOT, Job, environment_of_programs

_AWAY_S = 0.5, 12.0


@contextmanager
def object_store() -> Iterator[SeaweedFS]:
    """A store with a bucket called `bucket`, which this process and the programs that it starts find."""
    with tempfile.TemporaryDirectory(prefix="cherry-store-") as name:
        server = SeaweedFS(Path(name))
        given = {"AWS_ENDPOINT_URL": server.url, "AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET}
        os.environ.update(given, AWS_DEFAULT_REGION="us-east-1", NO_PROXY="127.0.0.1")
        try:
            server.start()
            S3FileSystem().mkdir("bucket")
            yield server
        finally:
            server.kill()


class StoreCampaign:
    """One job of two ranks on this machine, whose store is away for a while, again and again."""

    def __init__(self, job: Job, server: SeaweedFS, choose: random.Random) -> None:
        self._job, self._server, self._choose = job, server, choose
        self._directory = f"s3://bucket/{job.directory.name}"
        saves = ("--set", f"checkpoint.directory={self._directory}", "--set", "checkpoint.every_steps=20")
        self._flags = saves
        self._log = job.directory.parent / f"{job.directory.name}.log"
        self._process = self._start()
        self.faults: list[Fault] = []

    def run(self, count: int) -> list[float]:
        """Take the store away so often, then let the job end; its losses."""
        for _ in range(count):
            self.faults.append(self._take_away())
            print(f"  {len(self.faults):3d} {self.faults[-1]}", flush=True)
        self._process.terminate()
        self._process.wait()
        return finish(self._job, self.faults, len(self._job.losses) + 20, *self._flags)

    def close(self) -> None:
        """End the job, if it still runs."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()

    def _start(self) -> subprocess.Popen[bytes]:
        command = self._job.command("--steps=1000000", *self._flags, *CONSTANT, ranks=RANKS)
        with self._log.open("ab") as output:
            return subprocess.Popen(
                command, cwd=ROOT, env=environment_of_programs(), stdout=output, stderr=output, start_new_session=True
            )

    def _take_away(self) -> Fault:
        committed = until(self._newest, "a committed checkpoint")
        time.sleep(self._choose.uniform(0.0, 3.0))
        self._server.kill()
        fault, killed = Fault("object store killed", "local"), time.time()
        time.sleep(self._choose.uniform(*_AWAY_S))
        self._server.start()
        fault.data_lost = self._newest() < committed
        before = self._newest()

        def saved() -> bool:
            if (code := self._process.poll()) is not None:
                assert is_retryable_exit_code(code), f"{code}: {self._log.read_text()[-3000:]}"
                fault.detect_s = fault.detect_s or time.time() - killed
                self._process = self._start()
            return self._newest() > before

        until(saved, "the next committed checkpoint")
        fault.recover_s = time.time() - killed
        return fault

    def _newest(self) -> int:
        """Step of the newest committed checkpoint, once the store that was started again finds its volumes."""

        def found() -> list[str | None]:
            with suppress(StorageError):
                return [newest_checkpoint(self._directory)]
            return []

        (newest,) = until(found, "an answer of the store")
        return 0 if newest is None else int(newest.rpartition("_")[2])
