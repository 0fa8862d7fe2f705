"""Attempt: one start of a job on its hosts, until all have ended well or the first failure has ended it everywhere."""

from __future__ import annotations

import asyncio
import queue
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from base.errors import (
    USER_EXIT_CODES,
    CherryError,
    SupersededError,
    WorkerLostError,
    error_of_code,
    error_of_record,
)
from base.progress import print_progress
from cherry.remote.agent import KILL_S
from cherry.remote.carry import Carrier
from cherry.remote.connection import Session
from cherry.remote.job import Job
from cherry.remote.step_watch import StepWatch
from cherry.watch.stacks import keep_stacks, log_sizes

# A host whose peer failed ends by itself, with an error of its own, when its collective breaks: it may know the cause.
# One that was told to end by SIGTERM says so last, when its ranks, whose end breaks the others' collectives, are gone.
_PEER_GRACE_S = 10.0
# Ranks write their stacks at once, but may have to be woken for it.
_STACKS_S = 2.0
# A host that hangs may not answer at all.
_CARRY_LOGS_S = 5.0
_SHOWN_LINES = 10
_BY_SIGNAL = {128 + number: number for number in (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM)}
"""Exit codes of a launcher that a signal told to end, as a host does that shuts down, by the signals."""


class Printer:
    """Lines for standard output, printed by a thread of their own: a pager that waits does not hold up the leases.

    Args:
        silent: print nothing.
    """

    def __init__(self, *, silent: bool = False) -> None:
        self._silent = silent
        self._lines: queue.SimpleQueue[tuple[str, float | None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._print, name="printer", daemon=True)
        self._thread.start()

    def put(self, line: str, fraction: float | None = None) -> None:
        """Print a line, as progress where it has a fraction."""
        if not self._silent:
            self._lines.put((line, fraction))

    def close(self) -> None:
        """Wait until all lines are printed, or a moment where nobody reads them."""
        self._lines.put(None)
        self._thread.join(KILL_S)

    def _print(self) -> None:
        while (item := self._lines.get()) is not None:
            line, fraction = item
            try:
                print(line, flush=True) if fraction is None else print_progress(line, fraction)
            except OSError:
                sys.stdout = None  # its reader is gone; the job goes on
                return


@dataclass(frozen=True)
class Ending:
    """How a host's part of an attempt ended."""

    host: str
    code: int | None
    """Exit code of its launcher, negative for a signal; `None` where the host was lost."""
    error: CherryError | None
    """`None` for a good end."""
    after_s: float
    """Seconds since the attempt began."""

    @property
    def host_is_lost(self) -> bool:
        """Whether the host is gone, or about to go: it was told to shut down, or someone ended the job there."""
        return self.code is None or self.code in _BY_SIGNAL

    @property
    def weight(self) -> int:
        """Rank among the causes of a failure, lowest first: a user error, a lost host, anything else."""
        if self.code in USER_EXIT_CODES or self.code == SupersededError.exit_code:
            return 0
        return 1 if self.host_is_lost or (self.code is not None and self.code < 0) else 2


def start_launchers(job: Job, sessions: Sequence[Session]) -> int:
    """Port of the rendezvous, after starting a job's launchers; the host of rank 0 comes first."""
    wanted = job.spec.communication.interface
    facts = [session.facts for session in sessions if session.facts is not None]
    address, port = facts[0].address(wanted) or sessions[0].node.host, facts[0].free_port
    for rank, (session, fact) in enumerate(zip(sessions, facts, strict=True)):
        arguments = job.launcher_arguments(len(sessions), rank, address, port)
        session.start(arguments, job.environment(session.node, fact.interface(wanted)))
    return port


@dataclass(frozen=True)
class RankLogs:
    """Where the logs of a job's ranks are."""

    directory: Path
    """`train/` of the run directory."""
    ranks: int


class Attempt:
    """One start of a job.

    Args:
        sessions: the hosts' agents, the one of rank 0 first; they are closed at the end.
        watch: finds a hang by rank 0's progress; `None` leaves that to the timeout of a collective.
        logs: the ranks' logs, where the stacks of a hang are taken from; `None` leaves them there.
        carrier: brings the hosts' small files, and ends with the attempt; `None` where all share the run directory.
    """

    def __init__(
        self,
        sessions: Sequence[Session],
        printer: Printer,
        watch: StepWatch | None,
        logs: RankLogs | None,
        carrier: Carrier | None = None,
    ) -> None:
        self._sessions = list(sessions)
        self._printer = printer
        self._watch = watch
        self._logs = logs
        self._carrier = carrier
        self._began = time.monotonic()
        self._ended: dict[str, Ending] = {}
        self.figures: list[dict[str, float]] = []
        """What rank 0 has reported by `base.progress.report_figures`."""
        self._lines = {session.node.host: deque[str](maxlen=_SHOWN_LINES) for session in sessions}
        self._failure: asyncio.Future[Ending] = asyncio.get_running_loop().create_future()

    async def run(self) -> Ending | None:
        """Cause of the attempt's failure; `None` when all hosts ended well. No host's ranks run when it returns."""
        followed = [asyncio.create_task(self._follow(session)) for session in self._sessions]
        watching = asyncio.create_task(self._find_hang())
        cause = None
        try:
            while not self._failure.done() and (rest := [task for task in followed if not task.done()]):
                either: list[asyncio.Future[Any]] = [*rest, self._failure]
                await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if self._failure.done() and self._failure.result().weight == 2:
                await asyncio.wait(followed, timeout=_PEER_GRACE_S)
            for task in followed:
                if task.done():
                    task.result()
            cause = self._cause()  # what ends from now on was ended
        finally:
            watching.cancel()
            await self._end(followed)
        return cause

    def _cause(self) -> Ending | None:
        if not self._failure.done():
            return None
        failed = [ending for ending in self._ended.values() if ending.error is not None]
        return min([self._failure.result(), *failed], key=lambda ending: (ending.weight, ending.after_s))

    async def _end(self, followed: Sequence[asyncio.Task[None]]) -> None:
        """End the job on every host, and wait until it is gone from those that cannot be reached."""
        for session in self._sessions:
            session.send(end=True)
        _, silent = await asyncio.wait(followed, timeout=KILL_S + 1.0)
        for task in silent:
            task.cancel()
        if self._carrier is not None:
            await self._carrier.close()
        for session in self._sessions:
            await session.close()
        heard = {host for host, ending in self._ended.items() if ending.code is not None}
        gone_at = max((session.gone_at for session in self._sessions if session.node.host not in heard), default=0.0)
        if (left := gone_at - time.monotonic()) > 0:
            self._printer.put(f"waiting {left:.0f} s, until no rank can be left on a host that does not answer")
            await asyncio.sleep(left)

    async def _follow(self, session: Session) -> None:
        """Pass on what a host says until its part has ended."""
        host, first = session.node.host, session is self._sessions[0]
        async for message in session.messages():
            if "line" in message:
                self._lines[host].append(message["line"])
                fraction = message.get("fraction")
                self._printer.put(
                    message["line"] if first else f"{host}: {message['line']}", fraction if first else None
                )
                if first and fraction is not None and self._watch is not None:
                    self._watch.progressed()
            elif "figures" in message and first:
                self.figures.append(message["figures"])
            elif "busy" in message and first and self._watch is not None:
                self._watch.busy(message["busy"])
            elif "ended" in message:
                self._note(host, message["ended"]["code"], message["ended"]["error"])
                return
        lost = await session.is_lost()
        reason = "the connection broke" if lost else f"its agent ended: {' '.join(session.errors)}"
        self._fail(host, None, WorkerLostError(f"{host} is lost: {reason}."))

    def _note(self, host: str, code: int, record: object) -> None:
        if code == 0:
            self._ended[host] = Ending(host, 0, None, time.monotonic() - self._began)
            return
        error = error_of_record(record)
        if code in _BY_SIGNAL:  # the supervisor's own cancellation does not look at how its hosts end
            error = WorkerLostError(
                f"{host} counts as lost: {signal.Signals(_BY_SIGNAL[code]).name} ended the job there, which was not "
                "sent from here. The host shuts down, or someone ended it there."
            )
        elif error is None or error.exit_code != code:
            how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
            text = f"the launcher on {host} {how}; its last lines:\n" + "\n".join(self._lines[host])
            error = WorkerLostError(text) if code < 0 else error_of_code(code, text)
        self._fail(host, code, error)

    def _fail(self, host: str, code: int | None, error: CherryError) -> None:
        ending = Ending(host, code, error, time.monotonic() - self._began)
        self._ended[host] = ending
        if not self._failure.done():
            self._failure.set_result(ending)

    async def _find_hang(self) -> None:
        """Fail the attempt when its steps stop; every rank writes its stacks to its log first."""
        while self._watch is not None:
            await asyncio.sleep(1.0)
            if not self._watch.hangs():
                continue
            text = f"no step for {self._watch.silent_s:.0f} s, the limit is {self._watch.limit_s:.0f} s"
            self._printer.put(f"{text}: every rank writes its stacks to train/rank-<n>.log")
            where = await self._dump_stacks(f"the job hangs: {text}")
            with suppress(asyncio.InvalidStateError):
                error = WorkerLostError(f"the job hangs: {text}. The ranks' stacks are in {where}.")
                self._failure.set_result(Ending("a rank", None, error, time.monotonic() - self._began))
            return

    async def _dump_stacks(self, why: str) -> str:
        """Where the stacks of all ranks are, which they write now: in a file of their own, if the logs are here."""
        await self._carry_logs()
        before = {} if self._logs is None else log_sizes(self._logs.directory)
        for session in self._sessions:
            session.send(signal="SIGUSR1")
        await asyncio.sleep(_STACKS_S)
        await self._carry_logs()
        if self._logs is not None:
            with suppress(OSError):  # a full disk: they are in the logs
                # A file system that takes its time does not hold up the leases.
                return str(await asyncio.to_thread(keep_stacks, self._logs.directory, before, self._logs.ranks, why))
        return "train/rank-<n>.log"

    async def _carry_logs(self) -> None:
        if self._carrier is not None:
            await self._carrier.fetch(_CARRY_LOGS_S)
