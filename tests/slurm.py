"""A Slurm cluster for tests: the controller on this machine, and a slurmd on each host of tests/hosts.py.

apt-get install --no-install-recommends slurmctld slurmd slurm-client munge openssh-server iproute2 procps
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import stat
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests import hosts as lab
from tests.hosts import LabHosts
from tests.processes import command_line, kill_all

_PROGRAMS = ("slurmctld", "slurmd", "sbatch", "srun", "munged")
_PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
_DEADLINE_S = 300.0
GPUS = 2
"""Of each node, as Slurm counts them: no program can use them."""
# A dead node is noticed after SlurmdTimeout; a job is queued again after cred_expire; KillWait is from TERM to KILL.
_CONF = """\
ClusterName=tests
SlurmctldHost=head({gateway})
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmdPidFile={folder}/%n.pid
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=2,batch_sched_delay=0
MpiDefault=none
ReturnToService=2
SlurmdTimeout=8
SlurmctldTimeout=10
InactiveLimit=0
KillWait=3
MinJobAge=600
GresTypes=gpu
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO
"""
# The first cgroup plug-in asks for a mount of its own; from 23.11 on there is a way without.
_SLURMD = """\
mount -t tmpfs tmpfs /sys/fs/cgroup && mkdir -p /sys/fs/cgroup/freezer
exec "$0" -D -f "$1"
"""


def missing() -> str | None:
    """Why this machine cannot have a Slurm cluster; `None` when it can."""
    absent = [name for name in _PROGRAMS if shutil.which(name, path=_PATH) is None]
    if absent:
        return f"no {', '.join(absent)} here (Debian: slurmctld, slurmd, slurm-client, munge)"
    return lab.missing()


class SlurmLab:
    """A cluster on `node1`, `node2`, ...; this process's SLURM_CONF leads to it while a test has it."""

    def __init__(self, folder: Path, nodes: LabHosts) -> None:
        self.folder, self.hosts = folder, nodes
        self.conf = folder / "slurm.conf"
        self._programs: list[subprocess.Popen[bytes]] = []
        self._slurmds: dict[str, subprocess.Popen[bytes]] = {}

    def up(self) -> None:
        self.folder.mkdir()
        for name in ("state", *self.hosts.names):
            (self.folder / name).mkdir()
        with socket.socket() as probe:
            probe.bind(("", 0))
            port = probe.getsockname()[1]
        lines = [
            f"NodeName={name} NodeAddr={self.hosts.address(name)} CPUs=2 RealMemory=1000 Gres=gpu:{GPUS} State=UNKNOWN"
            for name in self.hosts.names
        ]
        text = _CONF.format(gateway=self.hosts.gateway, port=port, folder=self.folder, nodes="\n".join(lines))
        self.conf.write_text(text)
        plugin = "disabled" if _version() >= (23, 11) else "cgroup/v1"
        (self.folder / "cgroup.conf").write_text(f"CgroupPlugin={plugin}\n")
        devices = [self.folder / f"gpu{number}" for number in range(GPUS)]
        for device in devices:
            os.mknod(device, stat.S_IFCHR | 0o600, os.makedev(1, 3))  # /dev/null's
        text = "".join(f"Name=gpu File={device}\n" for device in devices)
        (self.folder / "gres.conf").write_text(text)
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        munge = [_program("munged"), "--foreground", "--force", f"--key-file={key}", f"--socket={self.folder}/munge"]
        munge += [f"--pid-file={self.folder}/munge.pid", f"--log-file={self.folder}/munge.log"]
        self._start([*munge, f"--seed-file={self.folder}/munge.seed", "--num-threads=2"], "munged")
        self.until((self.folder / "munge").exists, "munge")
        controller = ["unshare", "--uts", "sh", "-c", 'hostname head; exec "$0" -D -f "$1"', _program("slurmctld")]
        self._start([*controller, str(self.conf)], "slurmctld")
        for name in self.hosts.names:
            self.start_slurmd(name)
        self.until(lambda: self.states() == dict.fromkeys(self.hosts.names, "idle"), "all nodes idle")

    def start_slurmd(self, name: str) -> None:
        command = self.hosts.inside(name, "sh", "-c", _SLURMD, _program("slurmd"), str(self.conf))
        self._slurmds[name] = self._start(command, f"{name}-slurmd")

    def kill_slurmd(self, name: str) -> None:
        """End a node's slurmd alone: what it started goes on."""
        process = psutil.Process(self._slurmds[name].pid)
        kill_all(one for one in [*process.children(), process] if (command_line(one) or [""])[0].endswith("slurmd"))

    def states(self) -> dict[str, str]:
        """State of each node, as sinfo has it."""
        told = self.call("sinfo", "--noheader", "--Node", "--format=%n %t", check=False)
        return dict(line.split() for line in told.splitlines())

    def jobs(self) -> list[dict[str, str]]:
        """What the controller tells of each job that it knows, the oldest first."""
        told = self.call("scontrol", "show", "jobs", "--oneliner")
        found = [dict(re.findall(r"(?:^|\s)(\w+)=(\S*)", line)) for line in told.splitlines() if "JobId=" in line]
        return sorted(found, key=lambda job: int(job["JobId"]))

    def left(self) -> list[str]:
        """Command lines on the hosts, but for Slurm's own programs."""
        found = [one for name in self.hosts.names for one in self.hosts.processes(name)]
        lines = [command_line(one) for one in found if not one.info["name"].startswith("slurm")]
        return [" ".join(words) for words in lines if words]

    def call(self, *command: str, check: bool = True) -> str:
        environment = {**os.environ, "SLURM_CONF": str(self.conf)}
        ended = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        assert not check or ended.returncode == 0, ended.stderr
        return ended.stdout

    def until(self, condition: Callable[[], Any], what: str) -> Any:
        """The first true value of a condition."""
        deadline = time.monotonic() + _DEADLINE_S
        while not (value := condition()):
            assert time.monotonic() < deadline, f"not in {_DEADLINE_S} s: {what}; {self.logs()}"
            time.sleep(0.1)
        return value

    def logs(self) -> str:
        """The ends of the daemons' logs."""
        return "\n".join(f"{path.name}: {path.read_text()[-1500:]}" for path in sorted(self.folder.glob("*.log")))

    def _start(self, command: list[str], name: str) -> subprocess.Popen[bytes]:
        environment = {**os.environ, "SLURM_CONF": str(self.conf), "PATH": _PATH}
        with (self.folder / f"{name}.out").open("ab") as log:
            process = subprocess.Popen(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        self._programs.append(process)
        return process

    def down(self) -> None:
        for process in self._programs:  # nobody reads their state again; what is left on the hosts ends with them
            process.kill()
            process.wait()


def _program(name: str) -> str:
    found = shutil.which(name, path=_PATH)
    assert found is not None
    return found


def _version() -> tuple[int, int]:
    told = subprocess.run([_program("slurmd"), "-V"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"(\d+)\.(\d+)", told)
    assert found is not None
    return int(found[1]), int(found[2])


def slurm_lab(folder: Path, count: int) -> Iterator[SlurmLab]:
    """A cluster for the time of a test; skips where it cannot be had."""
    if (reason := missing()) is not None:
        pytest.skip(reason)
    for nodes in lab.lab_hosts(folder / "hosts", count):
        made = SlurmLab(folder / "slurm", nodes)
        try:
            made.up()
            yield made
        finally:
            made.down()
