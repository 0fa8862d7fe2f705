"""Small files of a host's run directory, carried over a real SFTP connection: what is new comes once, and whole."""

from __future__ import annotations

import asyncio
import os
from contextlib import asynccontextmanager

import asyncssh
import pytest

from base.errors import ConfigError
from cherry.remote.carry import Carrier, HostFiles, names_for


class Open(asyncssh.SSHServer):
    """Lets everybody in."""

    def begin_auth(self, username):
        return False


@asynccontextmanager
async def sftp_of(*folders):
    """SFTP clients of servers on this machine, one for each folder, which is the root of its files."""
    key = asyncssh.generate_private_key("ssh-ed25519")
    servers, connections = [], []
    for folder in folders:

        def files(channel, folder=folder):
            return asyncssh.SFTPServer(channel, chroot=os.fsencode(folder))

        servers.append(
            await asyncssh.listen("127.0.0.1", 0, server_factory=Open, server_host_keys=[key], sftp_factory=files)
        )
        given = {"username": "anyone", "known_hosts": None, "client_keys": None, "config": None}
        connections.append(await asyncssh.connect("127.0.0.1", servers[-1].get_port(), **given))
    try:
        yield [await connection.start_sftp_client() for connection in connections]
    finally:
        for one in (*connections, *servers):
            one.close()
            await one.wait_closed()


@pytest.fixture
def folders(tmp_path):
    """The run directory here, and the disks of two hosts."""
    made = [tmp_path / name for name in ("here", "one", "two")]
    for folder in made:
        folder.mkdir()
    return made


def on_host(folder, name, content, mode="w"):
    path = folder / "runs" / "tiny" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open(mode) as file:
        file.write(content)
    return path


def carried(folders, steps, names=()):
    """Run `steps(files)` on the files of one host, after a begin with these names."""

    async def go():
        async with sftp_of(folders[1]) as (sftp,):
            files = HostFiles("node1", sftp, "/runs/tiny", folders[0])
            await files.begin(names)
            await steps(files)

    asyncio.run(go())


def test_a_host_gets_what_its_ranks_read_and_nothing_that_an_earlier_attempt_left(folders):
    here, host, _ = folders
    (here / "config.yaml").write_text("name: tiny\n")
    (here / "train").mkdir()
    (here / "train" / "metrics.jsonl").write_text('{"step": 1}\n')
    on_host(host, "train/ranks/3.json", "old")
    on_host(host, "train/metrics.jsonl", "of another attempt\n")
    on_host(host, "data/COMMITTED", "stays")

    async def steps(files):
        assert await files.fetch() == ["train/metrics.jsonl"]
        assert await files.fetch() == []

    carried(folders, steps, names_for(0, "node1"))
    there = host / "runs" / "tiny"
    files = {path.relative_to(there).as_posix() for path in there.rglob("*") if path.is_file()}
    assert files == {"config.yaml", "train/metrics.jsonl", "data/COMMITTED"}
    assert (here / "train" / "metrics.jsonl").read_text() == '{"step": 1}\n'


def test_growth_is_appended_and_what_is_written_anew_replaces(folders):
    here, host, _ = folders
    lines = [f'{{"step": {step}, "time": {1000.5 + step}}}\n' for step in range(1, 400)]
    (here / "train").mkdir()
    (here / "train" / "metrics.jsonl").write_text("".join(lines[:100]))

    async def steps(files):
        metrics = here / "train" / "metrics.jsonl"
        on_host(host, "train/metrics.jsonl", "".join(lines[100:300]), "a")
        await files.fetch()
        before = metrics.stat().st_ino
        on_host(host, "train/metrics.jsonl", lines[300][:-9], "a")
        await files.fetch()
        on_host(host, "train/metrics.jsonl", lines[300][-9:], "a")
        await files.fetch()
        assert metrics.read_text() == "".join(lines[:301])
        assert metrics.stat().st_ino == before, "readers of a file that grew go on where they were"
        # A rollback: shorter, then as long as before it.
        anew = [line.replace("000.5", "000.7") for line in lines]
        for content in (lines[:200], lines[:200] + anew[200:301], lines[:200] + anew[200:350]):
            on_host(host, "train/metrics.jsonl", "".join(content))
            await files.fetch()
            assert metrics.read_text() == "".join(content)

    carried(folders, steps, names_for(0, "node1"))


def test_a_report_of_the_same_size_and_second_comes_too(folders):
    here, host, _ = folders

    async def steps(files):
        for text in ("first", "other"):
            path = on_host(host, "train/ranks/0.json", text)
            os.utime(path, (1e9, 1e9))  # SFTP tells whole seconds
            await files.fetch()
            assert (here / "train" / "ranks" / "0.json").read_text() == text

    carried(folders, steps)


def test_a_log_goes_on_from_that_of_the_host_before(folders):
    here, host, _ = folders
    (here / "train").mkdir()
    log = here / "train" / "rank-1.log"
    log.write_text("on node2\n")

    async def steps(files):
        for line in ("on node3\n", "more\n"):
            on_host(host, "train/rank-1.log", line, "a")
            await files.fetch()
            await files.fetch()

    carried(folders, steps)
    assert log.read_text() == "on node2\non node3\nmore\n"


def test_unfinished_files_and_the_fence_of_one_host_stay_there(folders):
    here, host, _ = folders

    async def steps(files):
        for name in ("ranks/0.tmp", "metrics.jsonl.12.34.tmp", "epoch-000001"):
            on_host(host, f"train/{name}", "x")
        on_host(host, "train/profile/deep/trace.json", "y")
        assert await files.fetch() == ["train/profile/deep/trace.json"]

    carried(folders, steps)
    assert [path.name for path in here.rglob("*") if path.is_file()] == ["trace.json"]


def test_a_disk_here_that_fails_loses_nothing(folders):
    here, host, _ = folders
    (here / "train").write_text("in the way")

    async def steps(files):
        on_host(host, "train/rank-0.log", "first\n", "a")
        with pytest.raises(OSError, match="exists"):
            await files.fetch()
        (here / "train").unlink()
        on_host(host, "train/rank-0.log", "second\n", "a")
        await files.fetch()

    carried(folders, steps)
    assert (here / "train" / "rank-0.log").read_text() == "first\nsecond\n"


def test_a_host_whose_run_directory_cannot_be_made_is_named(folders):
    (folders[1] / "runs").write_text("a file")

    async def go():
        async with sftp_of(folders[1]) as (sftp,):
            with pytest.raises(ConfigError, match=r"node1: its run directory /runs/tiny cannot be made.*ssh\.runs_dir"):
                await HostFiles("node1", sftp, "/runs/tiny", folders[0]).begin([])

    asyncio.run(go())


async def begun(clients, here):
    """Files of node1 and node2 at the begin of an attempt."""
    pairs = zip(("node1", "node2"), clients, strict=True)
    hosts = [HostFiles(host, sftp, "/runs/tiny", here) for host, sftp in pairs]
    for files in hosts:
        await files.begin([])
    return hosts


def test_reports_of_the_others_reach_rank_0_and_everything_is_here_at_the_end(folders):
    here, one, two = folders
    told = []

    async def go():
        async with sftp_of(one, two) as clients:
            hosts = await begun(clients, here)
            on_host(one, "train/ranks/0.json", "zero")
            on_host(two, "train/ranks/1.json", "one")
            carrier = Carrier(hosts, told.append)
            await carrier.fetch(60.0)
            assert (one / "runs/tiny/train/ranks/1.json").read_text() == "one"
            assert not (two / "runs/tiny/train/ranks/0.json").exists()
            on_host(two, "train/ranks/1.json", "newer")
            on_host(two, "train/rank-1.log", "last words\n")
            await carrier.close()

    asyncio.run(go())
    found = {path.name: path.read_text() for path in here.rglob("*") if path.is_file()}
    assert found == {"0.json": "zero", "1.json": "newer", "rank-1.log": "last words\n"}
    assert told == []


def test_a_host_that_is_lost_holds_up_nobody_and_is_not_told_twice(folders):
    here, one, two = folders
    told = []

    async def go():
        async with sftp_of(one, two) as clients:
            hosts = await begun(clients, here)
            clients[0].exit()
            await clients[0].wait_closed()
            on_host(two, "train/rank-1.log", "words\n")
            await Carrier(hosts, told.append).close()

    asyncio.run(go())
    assert (here / "train" / "rank-1.log").read_text() == "words\n"
    assert told == []
