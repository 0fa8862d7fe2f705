"""Preflight of a cluster that names its hosts: what each is and lacks, and an all-reduce over those that are fit.

The reasons against a host are those of a run, which is refused by the same rules (cherry/remote/facts.py); besides, its
GPUs must be free.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from base.errors import CherryError, ConfigError, InvalidInputError, WorkerLostError
from cherry.cluster import ClusterSpec
from cherry.remote.attempt import Attempt, Printer, start_launchers
from cherry.remote.connection import Session
from cherry.remote.facts import HostFacts
from cherry.remote.gather import Gathered, gather
from cherry.remote.job import Job
from cherry.remote.reach import Place

_ALL_REDUCE = "cherry.remote.all_reduce"
# Imports, the rendezvous and some seconds of all-reduces; a slow network takes longer for the largest.
_ALL_REDUCE_S = 180.0


@dataclass(frozen=True)
class HostReport:
    """One host of the cluster file."""

    host: str
    facts: HostFacts | None
    """`None` where it did not answer."""
    skew_s: float | None
    """Its clock minus the one here, in seconds."""
    error: CherryError | None
    """Why it is unfit, and what to do."""


@dataclass
class Report:
    """What a preflight has found."""

    hosts: list[HostReport]
    """In the order of the cluster file, spares last."""
    bandwidths: list[dict[str, float]] = field(default_factory=list)
    """Figures of the all-reduce, one a size; see `cherry.remote.all_reduce`."""
    ranks: list[str] = field(default_factory=list)
    """Hosts that took part in it; the number of ranks on each is `ranks_per_host`."""
    ranks_per_host: int = 1
    failure: CherryError | None = None
    """Why the all-reduce failed."""

    def error(self) -> CherryError | None:
        """`None` for a fit cluster; else the error that names every host that is not, a user error if any is."""
        errors = [report.error for report in self.hosts if report.error is not None]
        if self.failure is not None:
            errors.append(self.failure)
        if not errors:
            return None
        kind = ConfigError if any(isinstance(error, InvalidInputError) for error in errors) else WorkerLostError
        return kind("\n  ".join(["the cluster is not fit:", *map(str, errors)]))


def check_hosts(spec: ClusterSpec, directory: Path, on_hosts: Callable[[Report], None]) -> Report:
    """Preflight of all hosts of a cluster file, spares included.

    Args:
        directory: that of the runs; where it exists, every host must see it.
        on_hosts: called once the hosts have answered, before the all-reduce, which takes seconds.
    """
    # The flag is the training program's; here it only says which directory the hosts are asked about.
    program = ("-m", _ALL_REDUCE, "--run_dir", str(directory.resolve()))
    return asyncio.run(_check(Job(spec, len(spec.named), spec.node_gpus, program), on_hosts))


async def _check(job: Job, on_hosts: Callable[[Report], None]) -> Report:
    gathered = await gather(job, free_gpus=True)
    try:
        apart = await _find_unreachable(job, gathered.sessions)
        report = Report(_in_order(job, gathered, apart))
        on_hosts(report)
        await _measure(job, [one for one in gathered.sessions if one.node.host not in apart], report)
    finally:
        await gathered.close()
    return report


async def _find_unreachable(job: Job, sessions: list[Session]) -> dict[str, CherryError]:
    """Errors of the hosts that others cannot connect to, at the addresses that training uses."""
    ports = await asyncio.gather(*(session.listen() for session in sessions))
    places: list[Place] = []
    for session, port in zip(sessions, ports, strict=True):
        assert session.facts is not None
        address = session.facts.address(job.spec.communication.interface) or session.node.host
        places.append({"host": session.node.host, "address": address, "port": port})

    async def ask(session: Session) -> list[str]:
        return await session.unreachable([place for place in places if place["host"] != session.node.host])

    missed: dict[str, list[str]] = {}
    for session, hosts in zip(sessions, await asyncio.gather(*map(ask, sessions)), strict=True):
        for host in hosts:
            missed.setdefault(host, []).append(session.node.host)
    at = {place["host"]: f"{place['address']} port {place['port']}" for place in places}
    return {
        host: WorkerLostError(
            f"{host}: {', '.join(others)} cannot connect to it at {at[host]}. Open TCP between the hosts, on all "
            "ports, or name the network that they share: communication.interface in the cluster file."
        )
        for host, others in missed.items()
    }


def _in_order(job: Job, gathered: Gathered, apart: Mapping[str, CherryError]) -> list[HostReport]:
    reports = {
        refusal.host: HostReport(refusal.host, refusal.facts, refusal.skew_s, refusal.error)
        for refusal in gathered.refusals
    }
    for session in gathered.sessions:
        assert session.facts is not None and session.asked_at is not None
        skew_s = session.facts.time - session.asked_at
        host = session.node.host
        reports[host] = HostReport(host, session.facts, skew_s, apart.get(host))
    return [reports[node.host] for node in job.candidates]


def _usable_gpus(session: Session) -> int:
    assert session.facts is not None
    return session.facts.gpus if session.node.gpus is None else len(session.node.gpus)


async def _measure(job: Job, sessions: list[Session], report: Report) -> None:
    """Add the all-reduce to the report: over all GPUs that every host has, or one rank a host without GPUs."""
    if not sessions:
        return
    ranks = max(1, min(_usable_gpus(session) for session in sessions))
    if len(sessions) * ranks < 2:
        return
    report.ranks, report.ranks_per_host = [session.node.host for session in sessions], ranks
    job = Job(job.spec, len(sessions), ranks, job.program)
    printer = Printer(silent=True)
    attempt = Attempt(sessions, printer, None, None)
    start_launchers(job, sessions)
    try:
        async with asyncio.timeout(_ALL_REDUCE_S):
            cause = await attempt.run()
        if cause is not None and cause.error is not None:
            report.failure = WorkerLostError(f"the all-reduce failed first on {cause.host}: {cause.error}")
    except TimeoutError:
        hosts = ", ".join(report.ranks)
        report.failure = WorkerLostError(
            f"the all-reduce over {hosts} did not end within {_ALL_REDUCE_S:.0f} s. Try with fewer of them to find the "
            "slow one."
        )
    finally:
        printer.close()
    report.bandwidths = attempt.figures
