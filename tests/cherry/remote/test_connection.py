"""Connections to real ssh servers: whom they trust, what they say of a host that they refuse, and how one is lost."""

from __future__ import annotations

import asyncio
import shlex
import subprocess
import sys
import time
from pathlib import Path

import asyncssh
import pytest

from base.errors import ConfigError, WorkerLostError
from cherry.cluster import NodeSpec, SshConfig
from cherry.remote.agent import KILL_S
from cherry.remote.connection import LEASE_S, Session, agent_command, open_session
from cherry.remote.facts import PACKAGES_FOLDER

slow = pytest.mark.slow


def opened(host: str, ssh: SshConfig, after=None):
    """What `after` returns for a session on a host, or its facts."""

    async def go():
        session = await open_session(NodeSpec(host=host), ssh)
        try:
            return await (after(session) if after else session.ask(None, None))
        finally:
            await session.close()

    return asyncio.run(go())


@slow
def test_the_user_s_own_ssh_configuration_leads_to_a_host(at_home):
    facts = opened("node1", SshConfig())
    assert (facts.hostname, facts.reached_at) == ("node1", at_home.address("node1"))
    assert facts.interface(None) == "eth0"


@slow
def test_the_cluster_file_may_say_it_all(hosts, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    known = tmp_path / "known"
    key = (hosts.folder / "node1.key.pub").read_text().split()[:2]
    known.write_text(f"{hosts.address('node1')} {' '.join(key)}\n")
    ssh = SshConfig(user="root", port=22, identity=str(hosts.home / ".ssh" / "id_ed25519"), known_hosts=str(known))
    assert opened(hosts.address("node1"), ssh).hostname == "node1"


@slow
@pytest.mark.parametrize("known", ["", "node2's"])
def test_a_host_with_an_unknown_or_another_key_is_refused(at_home, tmp_path, known):
    path = tmp_path / "known"
    if known:
        other = (at_home.folder / "node2.key.pub").read_text().split()[:2]
        known = f"node1 {' '.join(other)}\n"
    path.write_text(known)
    with pytest.raises(
        ConfigError, match=rf"node1: its host key is not the one in {path}.*ssh-keyscan node1 >> {path}"
    ):
        opened("node1", SshConfig(known_hosts=str(path)))


@slow
def test_host_keys_are_checked_whatever_the_user_s_configuration_says(at_home, monkeypatch, tmp_path):
    ssh = tmp_path / ".ssh"
    ssh.mkdir()
    ssh.joinpath("config").write_text(
        f"Host node1\n  HostName {at_home.address('node1')}\n  UserKnownHostsFile none\n  StrictHostKeyChecking no\n"
    )
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(ConfigError, match=r"node1: .* turns the check of host keys off"):
        opened("node1", SshConfig())


@slow
def test_who_is_not_let_in_or_finds_no_environment_is_told_what_to_mend(at_home, tmp_path):
    stranger = tmp_path / "key"
    stranger.write_text((at_home.folder / "node2.key").read_text())
    with pytest.raises(ConfigError, match=r"node1: it refuses the user or the key .* ssh\.identity"):
        opened("node1", SshConfig(identity=str(stranger)))
    with pytest.raises(ConfigError, match=r"node1: ssh\.identity: .*/nokey cannot be read: No such file"):
        opened("node1", SshConfig(identity=str(tmp_path / "nokey")))
    with pytest.raises(ConfigError, match=r"node1: ssh\.identity: .* cannot be read: Is a directory"):
        opened("node1", SshConfig(identity=str(tmp_path)))
    with pytest.raises(ConfigError, match=r"node1: ssh\.known_hosts: .*/nohosts cannot be read: No such file"):
        opened("node1", SshConfig(known_hosts=str(tmp_path / "nohosts")))
    key = at_home.home / ".ssh" / "id_ed25519"
    for name, told in (
        (f"{key}.pub", rf"ssh\.identity: {key}\.pub is not a private key .*Without \.pub it is the private one"),
        (str(at_home.folder / "hosts"), r"ssh\.identity: .*/hosts is not a private key"),
    ):
        with pytest.raises(ConfigError, match=rf"node1: {told}"):
            opened("node1", SshConfig(identity=name))
    locked = tmp_path / "locked"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "secret", "-f", str(locked)], check=True)
    with pytest.raises(ConfigError, match=rf"ssh\.identity: {locked} has a passphrase, .*`ssh-add {locked}`"):
        opened("node1", SshConfig(identity=str(locked)))
    with pytest.raises(ConfigError, match=r"node1: this project's agent does not start there: .*python.* ssh\.python"):
        opened("node1", SshConfig(python="/nowhere/python"))
    with pytest.raises(ConfigError, match=r"agent does not start there: .*/no/folder"):
        opened("node1", SshConfig(directory="/no/folder"))


@slow
def test_a_name_or_a_port_where_nothing_is(at_home):
    with pytest.raises(WorkerLostError, match=r"nobody\.invalid: its name cannot be resolved"):
        opened("nobody.invalid", SshConfig())
    with pytest.raises(WorkerLostError, match=r"node1: it cannot be reached: no ssh server listens there"):
        opened("node1", SshConfig(port=2))


@slow
def test_a_cut_is_noticed_as_a_loss_and_the_lease_is_over_when_its_time_says(at_home):
    async def cut(session):
        await session.ask(None, None)
        session.start(["--nproc_per_node=0", "none.py"], {})
        began = time.monotonic()
        at_home.cut("node2")
        async for _ in session.messages():
            pass
        assert await session.is_lost()
        return session.gone_at - began

    try:
        gone_after = opened("node2", SshConfig(), cut)
    finally:
        at_home.join("node2")
    # The last promise was made at most a tick after the cut.
    assert gone_after > LEASE_S + KILL_S


@pytest.mark.parametrize("served", [True, False])
def test_a_server_without_sftp_is_told_what_to_add(served, tmp_path):
    """A server in this process: those of the hosts all have it."""

    class Open(asyncssh.SSHServer):
        def begin_auth(self, username):
            return False

    async def go():
        key = asyncssh.generate_private_key("ssh-ed25519")
        keys = {"server_factory": Open, "server_host_keys": [key]}
        server = await asyncssh.listen(
            "127.0.0.1", 0, **keys, sftp_factory=served, process_factory=lambda process: process.exit(0)
        )
        given = {"username": "anyone", "known_hosts": None, "client_keys": None, "config": None}
        connection = await asyncssh.connect("127.0.0.1", server.get_port(), **given)
        session = Session(NodeSpec(host="node1"), connection, await connection.create_process("", encoding=None))
        try:
            if served:
                return await (await session.open_files()).exists(str(tmp_path))
            with pytest.raises(ConfigError, match=r"node1: its ssh server has no SFTP.*Subsystem sftp internal-sftp"):
                await session.open_files()
            await session.close()
            with pytest.raises(WorkerLostError, match="node1: its files cannot be reached"):
                await session.open_files()
            return True
        finally:
            await session.close()
            server.close()
            await server.wait_closed()

    assert asyncio.run(go())


def test_the_agent_is_started_with_this_interpreter_or_the_one_that_is_named(monkeypatch):
    here = shlex.split(agent_command(SshConfig()))
    assert here[:5] == ["cd", str(Path.cwd()), "&&", "exec", "env"]
    assert here[-4:] == [sys.executable, "-P", "-m", "cherry.remote.agent"]
    assert f"PYTHONPATH={PACKAGES_FOLDER}" in here
    there = shlex.split(agent_command(SshConfig(python="/opt/my env/python", directory="/data")))
    assert there == ["cd", "/data", "&&", "exec", "env", "/opt/my env/python", "-P", "-m", "cherry.remote.agent"]
