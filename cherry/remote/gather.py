"""Hosts for an attempt: all that may serve are asked at once, and those that are fit are taken in order."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from base.errors import CherryError, ConfigError, InvalidInputError, WorkerLostError
from cherry.cluster import NodeSpec
from cherry.remote.connection import Session, open_session
from cherry.remote.facts import HostFacts, Needs, code_digest, unfit
from cherry.remote.job import Job


@dataclass(frozen=True)
class Refusal:
    """A host that cannot be taken, and why."""

    host: str
    error: CherryError
    facts: HostFacts | None = None
    """What it said; `None` where it did not answer."""
    skew_s: float | None = None
    """Its clock minus the one here, in seconds."""


@dataclass(frozen=True)
class Gathered:
    """Agents on the hosts that are fit, in the order of the cluster file, and the hosts that are not."""

    sessions: list[Session]
    refusals: list[Refusal]

    async def close(self, kept: Sequence[Session] = ()) -> None:
        """Close all connections but those that are kept."""
        await asyncio.gather(*(session.close() for session in self.sessions if session not in kept))


async def gather(job: Job, candidates: Sequence[NodeSpec] | None = None, *, free_gpus: bool = False) -> Gathered:
    """Agents on those of the job's hosts that answer and are fit for it.

    Args:
        candidates: hosts to ask; `None` asks all.
        free_gpus: whether a host whose GPUs are in use is unfit.
    """
    nodes = job.candidates if candidates is None else list(candidates)
    is_shared = job.spec.ssh.runs_directory is None
    with _mark(job.local_directory if is_shared else None) as mark:
        answers = await asyncio.gather(*(_open(node, job, mark) for node in nodes))
    code, like = code_digest(), None
    sessions, refusals = [], []
    machines: dict[tuple[str, str], str] = {}
    for node, answer in zip(nodes, answers, strict=True):
        if isinstance(answer, CherryError):
            refusals.append(Refusal(node.host, answer))
            continue
        session, facts = answer
        now = session.asked_at or time.time()
        needs = Needs(job.ranks_per_node, job.spec.communication.interface, code, like, free_gpus)
        reasons = list(unfit(node, facts, needs, now=now))
        if reasons:
            kind = WorkerLostError if all(reason.may_pass for reason in reasons) else ConfigError
            text = "; ".join(reason.text for reason in reasons)
            refusals.append(Refusal(node.host, kind(f"{node.host}: {text}."), facts, facts.time - now))
            await session.close()
            continue
        first = machines.setdefault((facts.hostname, facts.boot), node.host)
        if facts.boot and first != node.host:
            text = f"{node.host}: it is the same machine as {first}. Name each host once."
            refusals.append(Refusal(node.host, ConfigError(text)))
            await session.close()
            continue
        like = like or facts
        sessions.append(session)
    return Gathered(sessions, refusals)


async def _open(node: NodeSpec, job: Job, mark: Path | None) -> tuple[Session, HostFacts] | CherryError:
    try:
        session = await open_session(node, job.spec.ssh)
    except CherryError as error:
        return error
    try:
        facts = await session.ask(job.host_directory, None if mark is None else str(mark))
        if job.spec.ssh.runs_directory is not None:
            (await session.open_files()).exit()  # a host whose files cannot be carried is not taken
    except CherryError as error:
        await session.close()
        return error
    except BaseException:
        await session.close()
        raise
    return session, facts


@contextmanager
def _mark(directory: Path | None) -> Iterator[Path | None]:
    """A file in the run directory while the hosts are asked whether they see it."""
    if directory is None:
        yield None
        return
    mark = directory / f".seen-{uuid.uuid4().hex}"
    mark.touch()
    try:
        yield mark
    finally:
        mark.unlink(missing_ok=True)


def choose(job: Job, gathered: Gathered, failures: Counter[str]) -> list[Session]:
    """Agents of the hosts to take, in the order of the cluster file: those that have failed least, then the first.

    Args:
        failures: how often each host has ended an attempt.

    Raises:
        ConfigError, WorkerLostError: there are too few; the text names each host that is missing.
    """
    by_failures = sorted(gathered.sessions, key=lambda session: failures[session.node.host])
    fewest = min(job.spec.recovery.min_nodes or job.nodes, job.nodes)
    number = min(len(by_failures), job.nodes)
    while number >= fewest and number < job.nodes and not job.fits(number):
        number -= 1
    if number < fewest:
        raise too_few(job, gathered, fewest)
    taken = by_failures[:number]
    return [session for session in gathered.sessions if session in taken]


def too_few(job: Job, gathered: Gathered, fewest: int) -> CherryError:
    """The error of a job that has too few hosts: a user error where one of the reasons is."""
    errors = [refusal.error for refusal in gathered.refusals]
    kind = ConfigError if any(isinstance(error, InvalidInputError) for error in errors) else WorkerLostError
    asked, fit = len(job.candidates), len(gathered.sessions)
    lines = "".join(f"\n  {error}" for error in errors)
    return kind(f"{fit} of {asked} hosts are fit for the job, which needs {fewest}:{lines}")
