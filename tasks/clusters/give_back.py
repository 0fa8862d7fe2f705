"""Giving back: hosts of a run that no process works on, of a kept cluster, and all that is overdue or ownerless."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from base.config import load
from base.errors import CherryError, InvalidInputError, OperationalError
from tasks.clusters.taken import Taken, list_taken
from tasks.interruptions.leftovers import end_leftovers
from tasks.lease import holder, is_held, locked, read_lease, remove_lock_file
from tasks.processes.process import end_tree
from tasks.providers.protocol import CLUSTER_FILE, HOSTS_FILE, RESERVATION_FILE, read_reservation
from tasks.providers.registry import find_provider
from tasks.provision import release_hosts
from tasks.run_config import RunConfig

# A run ends its training by itself when its time is over; what is at work so long after that is stuck.
_OWNER_GRACE_S = 600.0


@dataclass(frozen=True)
class Reaped:
    """What a reaper did, a sentence each."""

    done: list[str]
    failed: list[str]


def give_back(taken: Taken) -> None:
    """Give the hosts back, and remove their record. Calling it again does nothing.

    Raises:
        InvalidInputError: a process works on the run.
        ConfigError: its record or its provider is not what this version knows.
        OperationalError: the provider could not be reached; the record stays.
    """
    if taken.is_kept:
        if not taken.directory.is_dir():
            return
        with locked(taken.directory):
            if read_reservation(taken.directory) != taken.reservation:
                return  # it was taken anew since
            release_kept(taken.directory)
            remove_lock_file(taken.directory)
        return
    with locked(taken.directory):
        if is_held(taken.directory):
            lease = read_lease(taken.directory) or {}
            raise InvalidInputError(
                f"{taken.name}: process {lease.get('pid')} on {lease.get('host')} works on this run. Stop that first "
                "(Ctrl-C, or `prefect flow-run cancel`), which gives its hosts back too."
            )
    _end_run(taken.directory)
    if (taken.directory / RESERVATION_FILE).exists():
        raise OperationalError(
            f"{taken.name}: its hosts were not given back, as the log says. Do it again when their provider answers."
        )


def release_kept(directory: Path) -> None:
    """Release the hosts of a kept cluster, and remove its record. Call it under `tasks.lease.locked`.

    Raises:
        CherryError: see `give_back`.
    """
    reservation = read_reservation(directory)
    if reservation is not None:
        find_provider(reservation.provider).release(reservation)
    for name in (HOSTS_FILE, CLUSTER_FILE, RESERVATION_FILE):  # the record last: without it nobody looks again
        (directory / name).unlink(missing_ok=True)


def _end_run(directory: Path) -> None:
    """End what a killed flow left: its program, its hosts, its lease, and its runs in the tracker."""
    try:
        config = load(str(directory / "config.yaml"), RunConfig)
        # The directory may have been moved since.
        config = config.model_copy(update={"runs_directory": str(directory.parent), "name": directory.name})
    except CherryError:  # of another version, or cut: the hosts are given back all the same
        with locked(directory):
            if not is_held(directory):
                release_hosts(directory)
        return
    end_leftovers(config)


def reap(runs_directory: Path) -> Reaped:
    """Give back what is overdue, or taken by a process that is gone. What cannot be given back does not stop the rest.

    A run that is at work ten minutes past its time is ended, where its process is on this host.
    """
    reaped = Reaped([], [])
    for taken in list_taken(runs_directory):
        if taken.state == "unreadable":
            reaped.failed.append(f"{taken.name}: {taken.reason}")
        if not taken.is_left:
            continue
        what = f"{taken.name}: {', '.join(taken.hosts) or 'what was taken'}"
        try:
            if taken.state == "overdue" and not taken.is_kept and not _ended_owner(taken):
                continue
            give_back(taken)
            reaped.done.append(f"{what} given back: {taken.reason}")
        except CherryError as error:
            reaped.failed.append(f"{what} not given back: {error}")
    return reaped


def _ended_owner(taken: Taken) -> bool:
    """Whether no process works on an overdue run any more; one that does is left some time, then ended.

    Raises:
        OperationalError: it is on another host.
    """
    with locked(taken.directory):
        held, process = is_held(taken.directory), holder(taken.directory)
    until = taken.reservation.until if taken.reservation is not None else None
    if not held:
        return True
    if until is not None and time.time() < until + _OWNER_GRACE_S:
        return False
    if process is None:
        lease = read_lease(taken.directory) or {}
        raise OperationalError(
            f"process {lease.get('pid')} on {lease.get('host')} still works on it. End it there, or run this there."
        )
    end_tree(process)
    return True
