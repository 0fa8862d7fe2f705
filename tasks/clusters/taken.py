"""What is taken: the reservations of runs and of kept clusters below a runs directory, and the state of each."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from base.errors import CherryError
from tasks.lease import is_held, locked
from tasks.providers.protocol import (
    HOSTS_FILE,
    KEPT_FOLDER,
    RESERVATION_FILE,
    Hosts,
    Reservation,
    read_hosts,
    read_reservation,
)
from tasks.providers.registry import find_provider

State = Literal["alive", "gone", "overdue", "unreadable"]
# An ssh host that is off takes some seconds to be noticed.
_AT_ONCE = 16


@dataclass(frozen=True)
class Taken:
    """Hosts that are held."""

    name: str
    """Name of the run, or of the kept cluster."""
    directory: Path
    is_kept: bool
    """Whether `cherry cluster up` took them; else a run did."""
    reservation: Reservation | None
    """`None` where the record cannot be read."""
    hosts: tuple[str, ...]
    """Their addresses; empty while they are being taken."""
    state: State
    """`overdue`: held past its time. `gone`: nobody owns it, or its hosts do not answer."""
    reason: str = ""
    """What the state was told by."""
    is_left: bool = False
    """Whether a reaper gives it back: it is overdue, or the process that took it is gone."""


def list_taken(runs_directory: Path, *, clock: Callable[[], float] = time.time) -> list[Taken]:
    """What is taken, kept clusters first, each in the order of names. The providers are asked whether it is alive."""
    places = [(path.parent, True) for path in sorted(runs_directory.glob(f"{KEPT_FOLDER}/*/{RESERVATION_FILE}"))]
    # Those beginning with a dot or an underline are no runs.
    runs = [path.parent for path in sorted(runs_directory.glob(f"*/{RESERVATION_FILE}"))]
    places += [(path, False) for path in runs if not path.name.startswith((".", "_"))]
    if not places:
        return []
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        found = pool.map(lambda place: _read(*place, now=clock()), places)
        return [one for one in found if one is not None]


def _read(directory: Path, is_kept: bool, *, now: float) -> Taken | None:
    """What a directory's record says; `None` where it was given back a moment ago."""
    try:
        reservation = read_reservation(directory)
        hosts = read_hosts(directory) if _is_taken(directory) else None
        if reservation is None:
            return None
        state, reason, is_left = _state(directory, is_kept, reservation, hosts, now)
    except CherryError as error:
        return Taken(directory.name, directory, is_kept, None, (), "unreadable", str(error))
    addresses = () if hosts is None else tuple(host.address for host in hosts.hosts)
    return Taken(directory.name, directory, is_kept, reservation, addresses, state, reason, is_left)


def _is_taken(directory: Path) -> bool:
    """Whether hosts.json is that of the reservation, and not of the one before it."""
    try:
        taken = (directory / HOSTS_FILE).stat().st_mtime_ns
        return taken >= (directory / RESERVATION_FILE).stat().st_mtime_ns
    except OSError:
        return False


def _state(
    directory: Path, is_kept: bool, reservation: Reservation, hosts: Hosts | None, now: float
) -> tuple[State, str, bool]:
    if reservation.until is not None and now >= reservation.until:
        return "overdue", "its maximum lifetime is over", True
    if not is_kept:
        with locked(directory):
            if not is_held(directory):
                return "gone", "no process works on the run", True
    if hosts is None:
        return "alive", "its hosts are being taken", False
    try:
        is_alive = find_provider(reservation.provider).is_alive(hosts)
    except CherryError as error:
        return ("gone" if is_kept else "alive"), str(error), False
    if is_alive:
        return "alive", "", False
    # A run has a process that looks for other hosts.
    silent = "its hosts do not all answer"
    if is_kept:
        return "gone", f"{silent}; `cherry cluster down {directory.name}` gives it back", False
    return "alive", silent, False
