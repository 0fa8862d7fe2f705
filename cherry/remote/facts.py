"""Facts of a host, which its agent reports before training starts there, and what makes a host unfit for a job."""

from __future__ import annotations

import os
import platform
import re
import shutil
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import psutil
from pydantic import BaseModel, ConfigDict

from cherry.cluster import NodeSpec
from cherry.planner.local_device import local_gpus
from cherry.remote.gpus import GpuFacts, collect_gpus
from cherry.remote.source_digest import source_digest

PACKAGES_FOLDER = Path(__file__).resolve().parents[2]
"""The folder that holds the packages: a checkout, or where a wheel was installed."""
TRAINING_SOURCES = ("base", "model", "cherry")
# File times order leases and logs; NTP keeps hosts within milliseconds.
MAX_SKEW_S = 30.0
# Logs and the launcher's files; checkpoints have a check of their own.
MIN_FREE_BYTES = 1 << 30
_GIB = 2**30


class HostFacts(BaseModel):
    """What a host is and has."""

    model_config = ConfigDict(frozen=True)

    hostname: str
    boot: str = ""
    """What the kernel calls this boot: two names of one machine have it, and the hostname, in common. Empty if not
    known."""
    python: str
    torch: str | None
    """Version of torch; `None` where it is not installed."""
    cuda: str | None = None
    """Version of CUDA that torch was built for; `None` for a build for CPUs."""
    driver: str | None = None
    """Version of the GPUs' driver; `None` where NVML does not tell."""
    code: str
    """Digest of this project's training code."""
    cores: int
    memory_gib: float
    """Memory that is free."""
    gpus: int
    gpu_facts: tuple[GpuFacts, ...] | None = None
    """State of each GPU; `None` where NVML does not tell."""
    time: float
    """The host's clock, Unix time."""
    free_bytes: int
    """Free on the disk of the run directory, or of the working directory without one."""
    sees_mark: bool | None
    """Whether the file is there that was to be looked for; `None` when none was."""
    own_address: str | None
    """What the host's own name resolves to."""
    interfaces: dict[str, str]
    """IP address of each network interface."""
    reached_at: str | None
    """The host's address at which ssh reached it."""
    free_port: int

    def interface(self, wanted: str | None) -> str | None:
        """Network interface for training: the one that is wanted, or the one that ssh reached; `None` if not known."""
        if wanted is not None:
            return wanted
        return next((name for name, address in self.interfaces.items() if address == self.reached_at), None)

    def address(self, wanted: str | None) -> str | None:
        """Address at which the other hosts reach this one, on the interface for training; `None` if not known."""
        return self.interfaces.get(self.interface(wanted) or "") or self.reached_at


def collect_facts(directory: str | None, mark: str | None) -> HostFacts:
    """Facts of this host.

    Args:
        directory: the run directory, whose disk counts.
        mark: path of a file that another host has just written, by which a shared file system is known.
    """
    driver, gpus = collect_gpus()
    place = Path(directory or ".").resolve()
    while not place.exists():
        place = place.parent
    return HostFacts(
        hostname=socket.gethostname(),
        boot=_boot(),
        python=platform.python_version(),
        torch=_version("torch"),
        cuda=_torch_cuda(),
        driver=driver,
        code=code_digest(),
        cores=os.cpu_count() or 1,
        memory_gib=psutil.virtual_memory().available / _GIB,
        gpus=len(local_gpus()),
        gpu_facts=gpus,
        time=time.time(),
        free_bytes=shutil.disk_usage(place).free,
        sees_mark=None if mark is None else Path(mark).exists(),
        own_address=_own_address(),
        interfaces=_interfaces(),
        reached_at=_reached_at(),
        free_port=_free_port(),
    )


def code_digest() -> str:
    """Digest of the training code of this process."""
    return source_digest(PACKAGES_FOLDER, TRAINING_SOURCES)


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _torch_cuda() -> str | None:
    """The version that torch's own `version.py` names, without the seconds that importing torch takes."""
    found = find_spec("torch")
    places = found.submodule_search_locations if found is not None else None
    path = Path(next(iter(places), "")) / "version.py" if places else None
    if path is None or not path.is_file():
        return None
    assigned = re.search(r"^cuda[^=]*= '([^']+)'", path.read_text(), re.MULTILINE)
    return assigned[1] if assigned else None


def _own_address() -> str | None:
    try:
        return socket.gethostbyname(socket.gethostname())
    except OSError:
        return None


def _interfaces() -> dict[str, str]:
    """First address of each interface, IPv4 before IPv6."""
    found: dict[str, str] = {}
    for family in (socket.AF_INET, socket.AF_INET6):
        for name, addresses in psutil.net_if_addrs().items():
            for address in addresses:
                if address.family == family:
                    found.setdefault(name, address.address.partition("%")[0])
    return found


def _reached_at() -> str | None:
    """This host's end of the ssh connection: the third word of SSH_CONNECTION (ssh(1))."""
    words = os.environ.get("SSH_CONNECTION", "").split()
    return words[2] if len(words) == 4 else None


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


@dataclass(frozen=True)
class Needs:
    """What a job needs of each of its hosts."""

    ranks_per_node: int
    interface: str | None
    """Network interface that the configuration names."""
    code: str
    """Digest of the training code of whoever starts the job."""
    like: HostFacts | None = None
    """A host of the same job, whose versions are the job's."""
    free_gpus: bool = False
    """Whether GPUs must be unused. A job's own ranks may still be ending when its hosts are asked again."""


@dataclass(frozen=True)
class Unfit:
    """A reason against a host."""

    text: str
    may_pass: bool = False
    """Whether it may be gone when it is asked again."""


def unfit(node: NodeSpec, facts: HostFacts, needs: Needs, *, now: float) -> Iterator[Unfit]:
    """Reasons against a host for a job; none for a host that is fit.

    Args:
        now: Unix time here when the facts came.
    """
    if facts.torch is None:
        yield Unfit("torch is not installed there")
    if needs.like is not None:
        for name in ("python", "torch", "cuda"):
            there, others = getattr(facts, name), getattr(needs.like, name)
            if there != others:
                yield Unfit(f"it has {name} {there}, {needs.like.hostname} has {others}; install equal versions")
    if facts.code != needs.code:
        yield Unfit(
            "its copy of this project differs from the one here; install the same version, or update the checkout"
        )
    yield from _unfit_gpus(node, facts, needs)
    yield from _unfit_network(facts, needs.interface)
    if facts.sees_mark is False:
        yield Unfit(
            "it does not see the run directory; put it on a file system that all hosts share, or name a directory for "
            "run directories of their own: ssh.runs_directory of the cluster file"
        )
    if abs(facts.time - now) > MAX_SKEW_S:
        yield Unfit(f"its clock differs by {facts.time - now:+.0f} s from the one here; run NTP there", may_pass=True)
    if facts.free_bytes < MIN_FREE_BYTES:
        text = f"{facts.free_bytes / _GIB:.2f} GiB are free on the disk of the run directory; free at least 1 GiB"
        yield Unfit(text, may_pass=True)


def _unfit_gpus(node: NodeSpec, facts: HostFacts, needs: Needs) -> Iterator[Unfit]:
    ranks = needs.ranks_per_node
    if node.gpus is not None and max(node.gpus) >= facts.gpus:
        yield Unfit(f"it has {facts.gpus} GPUs, and the cluster file lists GPU {max(node.gpus)} (they count from 0)")
    usable = facts.gpus if node.gpus is None else len(node.gpus)
    if usable and ranks > usable:
        yield Unfit(f"{ranks} ranks are to run there (launch.nproc_per_node), and it has {usable} GPUs for them")
    for gpu in facts.gpu_facts or ():
        if node.gpus is None or gpu.index in node.gpus:
            yield from (Unfit(fault) for fault in gpu.faults())
            if needs.free_gpus and gpu.is_busy:
                yield Unfit(f"{gpu.use()}; end what runs there", may_pass=True)


def _unfit_network(facts: HostFacts, wanted: str | None) -> Iterator[Unfit]:
    if wanted is not None and wanted not in facts.interfaces:
        known = ", ".join(facts.interfaces)
        yield Unfit(f"it has no network interface {wanted} (communication.interface); it has {known}")
    elif facts.interface(wanted) is None and (facts.own_address or "127.").startswith("127."):
        yield Unfit(
            f"its own name resolves to {facts.own_address}, where no other host reaches it; set "
            "communication.interface in the cluster file, or mend /etc/hosts there"
        )
