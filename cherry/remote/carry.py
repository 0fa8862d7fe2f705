"""Small files of the run directory, carried between this machine and hosts that share no file system with it.

Each host has a run directory of its own (ssh.runs_directory). Before an attempt it gets the files that its ranks read
or append to; from then on, what is new in its `train/` comes here: by its growth where a file grows, else whole. All of
it goes by SFTP over the connection of the host's agent, so there is nothing to carry once that is lost.
"""

from __future__ import annotations

import asyncio
import stat
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import asyncssh

from base import storage
from base.errors import CherryError, ConfigError, WorkerLostError
from cherry.train_record import METRICS_FILE
from cherry.watch.node_sampler import NODES_FOLDER
from cherry.watch.rank_report import RANKS_FOLDER
from cherry.watch.stragglers import STRAGGLERS_FILE

CARRY_S = 2.0
"""Seconds between two looks at a host's files."""
_LAST_S = 60.0
"""Seconds that the files of hosts whose launchers have ended may take."""
# Two lines of metrics or samples differ within this many bytes, as both have their time.
_TAIL_BYTES = 512
_TRAIN = "train"
_LOST = (asyncssh.SFTPConnectionLost, asyncssh.SFTPNoConnection)

State = tuple[int, int]
"""Bytes, and time of the last change in seconds, which is as fine as SFTP tells it."""


@dataclass
class _Taken:
    """What was taken of a host's file."""

    size: int = 0
    """Bytes from its beginning."""
    tail: bytes = b""
    """The last of these bytes, by which a file that grew is told from one that was written anew."""
    state: State | None = None
    is_settled: bool = False
    """Whether it was in this state at two looks: it may have changed again within the second of the first."""


class HostFiles:
    """The run directory of one host.

    Args:
        there: its path on the host.
        here: the run directory on this machine.
    """

    def __init__(self, host: str, sftp: asyncssh.SFTPClient, there: str, here: Path) -> None:
        self.host = host
        self._sftp, self._there, self._here = sftp, there, here
        self._taken: dict[str, _Taken] = {}
        self._lent: set[str] = set()
        self._one_at_a_time = asyncio.Lock()

    async def begin(self, names: Iterable[str]) -> None:
        """Give the host those of the files here that exist, in place of whatever is in its `train/`.

        Args:
            names: relative to the run directory.

        Raises:
            ConfigError: the run directory cannot be made there.
            WorkerLostError: the host was lost, or its disk fails.
        """
        try:
            await self._make_directories()
            for name in names:
                if (self._here / name).is_file():
                    data = await self._put(name)
                    self._taken[name] = _Taken(len(data), data[-_TAIL_BYTES:])
        except (OSError, asyncssh.Error) as error:
            raise WorkerLostError(f"{self.host}: its run directory {self._there} cannot be filled: {error}") from error

    async def _make_directories(self) -> None:
        await self._sftp.rmtree(f"{self._there}/{_TRAIN}", ignore_errors=True)
        try:
            for folder in (_TRAIN, f"{_TRAIN}/{RANKS_FOLDER}", f"{_TRAIN}/{NODES_FOLDER}"):
                await self._sftp.makedirs(f"{self._there}/{folder}", exist_ok=True)
        except _LOST:
            raise
        except asyncssh.SFTPError as error:
            raise ConfigError(
                f"{self.host}: its run directory {self._there} cannot be made: {error.reason}. Name a directory in "
                "ssh.runs_directory of the cluster file that the user may write to there."
            ) from error

    async def lend(self, names: Iterable[str]) -> None:
        """Give the host other hosts' files, which do not come back from it.

        Raises:
            OSError, asyncssh.Error: the host was lost, or a disk fails.
        """
        for name in names:
            self._lent.add(name)
            await self._put(name)

    async def _put(self, name: str) -> bytes:
        data = await asyncio.to_thread((self._here / name).read_bytes)
        async with self._sftp.open(f"{self._there}/{name}", "wb") as file:
            await file.write(data)
        return data

    async def fetch(self) -> list[str]:
        """Names of files in the host's `train/` that were new or changed, and are here now.

        Raises:
            OSError, CherryError: a disk fails; the next call goes on where this one ended.
            asyncssh.Error: the host was lost.
        """
        async with self._one_at_a_time:
            found = await self._find(_TRAIN)
            return [name for name, state in found.items() if name not in self._lent and await self._take(name, state)]

    async def _find(self, folder: str) -> dict[str, State]:
        """States of the files below a folder that are to be carried, by name."""
        found: dict[str, State] = {}
        for entry in await self._sftp.readdir(f"{self._there}/{folder}"):
            last, mode = str(entry.filename), entry.attrs.permissions or 0
            if stat.S_ISDIR(mode) and last not in (".", ".."):
                found |= await self._find(f"{folder}/{last}")
            # Files that are being written get their names at their end. The fence's are for hosts that see each other.
            elif stat.S_ISREG(mode) and not last.endswith(".tmp") and not last.startswith("epoch-"):
                found[f"{folder}/{last}"] = entry.attrs.size or 0, entry.attrs.mtime or 0
        return found

    async def _take(self, name: str, state: State) -> bool:
        """Bring what is new of a file; false where nothing is."""
        taken = self._taken.setdefault(name, _Taken())
        if taken.state == state and taken.is_settled:
            return False
        is_known = taken.state == state
        begin = taken.size - len(taken.tail)
        with suppress(asyncssh.SFTPNoSuchFile):  # replaced or moved just now
            async with self._sftp.open(f"{self._there}/{name}", "rb") as file:
                data = await _read(file, begin)
                grew = data.startswith(taken.tail)
                if not grew:
                    data = await _read(file, 0)
            await asyncio.to_thread(self._store, name, taken, data, grew=grew)
            taken.state, taken.is_settled = state, is_known
        return not is_known

    def _store(self, name: str, taken: _Taken, data: bytes, *, grew: bool) -> None:
        """Append what a file grew by, or replace the file here; a log goes on from that of an earlier attempt's host.

        Args:
            data: the file from the tail that was taken before; all of it, unless it grew.
        """
        path = self._here / name
        if grew and (taken.size or path.suffix == ".log"):
            new = data[len(taken.tail) :]
            if new:
                path.parent.mkdir(parents=True, exist_ok=True)
                with path.open("ab", buffering=0) as handle:
                    new = new[: handle.write(new)]  # an almost full disk takes a part
            taken.size += len(new)
        else:
            storage.write_bytes(str(path), data)
            new, taken.size, taken.tail = data, len(data), b""
        taken.tail = (taken.tail + new)[-_TAIL_BYTES:]


async def _read(file: asyncssh.SFTPClientFile, begin: int) -> bytes:
    """The rest of a file; empty where it is shorter."""
    size = ((await file.stat()).size or 0) - begin
    return await file.read(size, begin) if size > 0 else b""


def names_for(rank: int, hostname: str) -> list[str]:
    """Files that a host needs of the run directory: the config, and what its processes continue.

    Args:
        rank: the node's; rank 0 of the job is on node 0.
        hostname: the host's own name for itself.
    """
    first = [f"{_TRAIN}/{METRICS_FILE}", f"{_TRAIN}/{STRAGGLERS_FILE}"] if rank == 0 else []
    return ["config.yaml", f"{_TRAIN}/{NODES_FOLDER}/{hostname}.jsonl", *first]


class Carrier:
    """The run directories of an attempt's hosts, the one of rank 0 first.

    Args:
        tell: called with a sentence when files of a host are not carried for the first time.
    """

    def __init__(self, hosts: Sequence[HostFiles], tell: Callable[[str], None]) -> None:
        self._hosts, self._tell = hosts, tell
        self._told: set[str] = set()
        self._over = asyncio.Event()
        # A host that takes its time does not hold up the files of the others.
        self._tasks = [asyncio.create_task(self._follow(one)) for one in hosts]

    async def fetch(self, timeout_s: float) -> None:
        """Fetch what is new now, from the hosts that answer in this time."""
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await asyncio.gather(*map(self._fetch, self._hosts))

    async def close(self) -> None:
        """Fetch what is left on hosts whose launchers have ended, and stop."""
        self._over.set()
        _, slow = await asyncio.wait(self._tasks, timeout=_LAST_S)
        for task in slow:
            task.cancel()

    async def _follow(self, one: HostFiles) -> None:
        while not self._over.is_set():
            await self._fetch(one)
            with suppress(TimeoutError):
                await asyncio.wait_for(self._over.wait(), CARRY_S)
        await self._fetch(one)

    async def _fetch(self, one: HostFiles) -> None:
        first = self._hosts[0]
        try:
            changed = await one.fetch()
            if one is not first:  # rank 0 compares the ranks' reports
                await first.lend(name for name in changed if name.startswith(f"{_TRAIN}/{RANKS_FOLDER}/"))
        except _LOST:
            pass  # the loss is told as such
        except (OSError, CherryError, asyncssh.Error) as error:
            if one.host not in self._told:
                self._told.add(one.host)
                self._tell(f"{one.host}: its metrics and logs do not come here now, training continues: {error}")
