"""Hosts for tests: network namespaces on a bridge, each with its own name, processes, network and ssh server.

They share this machine's clock, and its file system but for the directories that each has of its own. `power_loss` and
`cut` are silent: peers get neither FIN nor RST.
"""

from __future__ import annotations

import itertools
import os
import pwd
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tests.processes import every

_PROGRAMS = ("ip", "sshd", "ssh-keygen", "unshare", "mount")
_PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
_DEADLINE_S = 60.0
_SERVERS = ("sshd", "sshd-session")
_NUMBERS = itertools.count()
# The first program of a host: its name, its view of /proc and /etc/hosts, then its ssh server. bash reads root's
# .bashrc for every command over ssh, and what that starts may take half a second.
_INIT = """\
set -e
hostname "$1"
mount --make-rprivate /
mount -t proc proc /proc
mount --bind "$2/hosts" /etc/hosts
[ ! -e "$3/.bashrc" ] || mount --bind /dev/null "$3/.bashrc"
sshd=$4 config=$2/$1.conf
shift 4
for directory; do mount -t tmpfs tmpfs "$directory"; done
exec "$sshd" -D -e -f "$config"
"""
_SSHD = """\
Port 22
ListenAddress {address}
HostKey {folder}/{name}.key
PidFile none
AuthorizedKeysFile {folder}/home/.ssh/id_ed25519.pub
StrictModes no
PasswordAuthentication no
KbdInteractiveAuthentication no
PermitRootLogin prohibit-password
UsePAM no
Subsystem sftp internal-sftp
MaxStartups 100:30:200
"""
_SSH = """\
Host {name}
  HostName {address}
  HostKeyAlias {name}
  User root
"""


def missing() -> str | None:
    """Why this machine cannot have such hosts; `None` when it can."""
    if os.name != "posix" or os.geteuid() != 0:
        return "only root may make network namespaces"
    absent = [name for name in _PROGRAMS if shutil.which(name, path=_PATH) is None]
    if absent:
        return f"no {', '.join(absent)} here (Debian: openssh-server, iproute2, util-linux)"
    tried = subprocess.run(
        ["unshare", "--net", "--uts", "--pid", "--mount", "--fork", "true"], capture_output=True, text=True, check=False
    )
    return f"namespaces are not allowed here: {tried.stderr.strip()}" if tried.returncode else None


def program(name: str) -> str:
    found = shutil.which(name, path=_PATH)
    assert found is not None
    return found


class LabHosts:
    """`node1`, `node2`, ... and what may happen to them.

    Args:
        own: directories that are each host's own, empty when it starts; they must exist here.
    """

    def __init__(self, folder: Path, count: int, *, own: Sequence[Path] = ()) -> None:
        self.folder = folder
        self._own = own
        self.home = folder / "home"
        """HOME with the ssh configuration that reaches them by name."""
        self.names = [f"node{number}" for number in range(1, count + 1)]
        number = next(_NUMBERS)  # a process may have several, and the kernel takes its time to remove one
        self._tag = f"c{os.getpid() % 1_000_000}{chr(ord('a') + number % 26)}"
        self._net = _free_net(os.getpid() + number)
        self._inits: dict[str, subprocess.Popen[bytes]] = {}

    def address(self, name: str) -> str:
        return f"{self._net}.{10 + self.names.index(name)}"

    @property
    def gateway(self) -> str:
        """This machine's address, by which the hosts reach it; they know it as `head`."""
        return f"{self._net}.1"

    def inside(self, name: str, *command: str) -> list[str]:
        """The command that runs a command on a host."""
        init = psutil.Process(self._inits[name].pid).children()[0]
        return [program("nsenter"), f"--target={init.pid}", "--net", "--uts", "--mount", "--pid", "--ipc", *command]

    def up(self) -> None:
        (self.home / ".ssh").mkdir(parents=True)
        Path("/run/sshd").mkdir(exist_ok=True)
        _run("ip", "link", "add", self._tag, "type", "bridge")
        _run("ip", "addr", "add", f"{self.gateway}/24", "dev", self._tag)
        _run("ip", "link", "set", self._tag, "up")
        named = [f"{self.address(name)} {name}" for name in self.names]
        lines = ["127.0.0.1 localhost", f"{self.gateway} head", *named]
        (self.folder / "hosts").write_text("\n".join(lines) + "\n")
        _key(self.home / ".ssh" / "id_ed25519")
        for name in self.names:
            self._make(name)
        ssh = self.home / ".ssh"
        (ssh / "config").write_text("".join(_SSH.format(name=name, address=self.address(name)) for name in self.names))
        keys = {name: (self.folder / f"{name}.key.pub").read_text().split()[:2] for name in self.names}
        (ssh / "known_hosts").write_text("".join(f"{name} {' '.join(key)}\n" for name, key in keys.items()))
        for name in self.names:
            self._wait(name)

    def _make(self, name: str) -> None:
        space, link = self._space(name), self._link(name)
        _run("ip", "netns", "add", space)
        _run("ip", "link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", space)
        _run("ip", "link", "set", link, "master", self._tag, "up")
        _run("ip", "-n", space, "addr", "add", f"{self.address(name)}/24", "dev", "eth0")
        _run("ip", "-n", space, "link", "set", "eth0", "up")
        _run("ip", "-n", space, "link", "set", "lo", "up")
        _key(self.folder / f"{name}.key")
        config = _SSHD.format(name=name, address=self.address(name), folder=self.folder)
        (self.folder / f"{name}.conf").write_text(config)
        self._boot(name)

    def _boot(self, name: str) -> None:
        spaces = ["--uts", "--pid", "--mount", "--ipc", "--fork", "--kill-child"]
        init = ["sh", "-c", _INIT, "init", name, str(self.folder), pwd.getpwuid(0).pw_dir, program("sshd")]
        init += map(str, self._own)
        with (self.folder / f"{name}.log").open("ab") as log:
            self._inits[name] = subprocess.Popen(
                [program("ip"), "netns", "exec", self._space(name), program("unshare"), *spaces, *init],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def _wait(self, name: str) -> None:
        """Wait until its ssh server listens."""
        deadline = time.monotonic() + _DEADLINE_S
        while True:
            with suppress(OSError), socket.create_connection((self.address(name), 22), timeout=1.0):
                return
            assert time.monotonic() < deadline, (self.folder / f"{name}.log").read_text()
            time.sleep(0.05)

    def _space(self, name: str) -> str:
        return f"{self._tag}-{name}"

    def _link(self, name: str) -> str:
        return f"{self._tag}v{self.names.index(name)}"

    def cut(self, name: str) -> None:
        """Take a host off the network."""
        _run("ip", "link", "set", self._link(name), "down")

    def join(self, name: str) -> None:
        """Put it back on the network."""
        _run("ip", "link", "set", self._link(name), "up")

    def halt(self, name: str) -> None:
        """End all its processes; the kernel closes their connections."""
        self._inits[name].kill()
        self._inits[name].wait()

    def power_loss(self, name: str) -> None:
        """End all its processes, of which nobody hears."""
        self.cut(name)
        self.halt(name)

    def start(self, name: str) -> None:
        """Boot a host that was halted or lost its power."""
        assert self._inits[name].poll() is not None, f"{name} runs"
        self.join(name)
        self._boot(name)
        self._wait(name)

    def processes(self, name: str) -> list[psutil.Process]:
        """Processes that run on a host, but for its ssh server."""
        return [one for one in self._all(name) if one.info["name"] not in _SERVERS]

    def sessions(self, name: str) -> list[psutil.Process]:
        """The ssh server's processes of open connections."""
        return [
            one for one in self._all(name) if one.info["name"] in _SERVERS and one.info["ppid"] != self._inits[name].pid
        ]

    def _all(self, name: str) -> list[psutil.Process]:
        children = psutil.Process(self._inits[name].pid).children() if self._inits[name].poll() is None else []
        space = next((_pid_space(child.pid) for child in children), None)
        if space is None:
            return []
        found = every("name", "ppid", "status")
        return [one for one in found if one.info["status"] != psutil.STATUS_ZOMBIE and _pid_space(one.pid) == space]

    def down(self) -> None:
        for init in self._inits.values():
            init.kill()
            init.wait()
        for name in self.names:
            subprocess.run([program("ip"), "netns", "del", self._space(name)], capture_output=True, check=False)
            subprocess.run([program("ip"), "link", "del", self._link(name)], capture_output=True, check=False)
        subprocess.run([program("ip"), "link", "del", self._tag], capture_output=True, check=False)


def _free_net(first: int) -> str:
    """First three numbers of the addresses, such as no other hosts of this machine have, like those of other tests."""
    taken = {address.address.rpartition(".")[0] for found in psutil.net_if_addrs().values() for address in found}
    return next(net for number in range(250) if (net := f"10.213.{(first + number) % 250}") not in taken)


def _pid_space(pid: int) -> str | None:
    try:
        return os.readlink(f"/proc/{pid}/ns/pid")
    except OSError:
        return None


def _key(path: Path) -> None:
    _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", path.stem, "-f", str(path))


def _run(name: str, *arguments: str) -> None:
    subprocess.run([program(name), *arguments], check=True, capture_output=True)


def lab_hosts(folder: Path, count: int, *, own: Sequence[Path] = ()) -> Iterator[LabHosts]:
    """Hosts for the time of a test; skips where they cannot be had."""
    if (reason := missing()) is not None:
        pytest.skip(reason)
    hosts = LabHosts(folder, count, own=own)
    try:
        hosts.up()
        yield hosts
    finally:
        hosts.down()
