"""Supervisor: starts a job on all its hosts, and again from its newest checkpoint when a host or a rank is lost.

    cherry-launch --cluster cluster.yaml train.py --config CONFIG --run_dir DIRECTORY

It runs on any machine that reaches the hosts by ssh, and needs no torch there. The job ends with it, however it ends.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from base.errors import (
    CherryError,
    HardwareError,
    OperationalError,
    WorkerLostError,
    is_retryable_exit_code,
    run_program,
)
from base.json_lines import append_json, as_record, read_lines
from base.lost_output import outlive_output
from cherry.launcher import die_with_parent
from cherry.remote.agent import KILL_S
from cherry.remote.attempt import Attempt, Ending, Printer, RankLogs, start_launchers
from cherry.remote.carry import Carrier, HostFiles, names_for
from cherry.remote.connection import LEASE_MARGIN_S, LEASE_S, Session
from cherry.remote.gather import Gathered, Refusal, choose, gather
from cherry.remote.job import ATTEMPTS_FILE, Job, parse_job
from cherry.remote.prepared_data import DATA_FOLDER, publish
from cherry.remote.step_watch import StepWatch

_MAX_BACKOFF_S = 300.0


@dataclass(frozen=True)
class _Began:
    """Line of attempts.jsonl for the begin of an attempt."""

    event: str
    hosts: list[str]


class Supervisor:
    """The attempts of one job.

    Args:
        data: URI of the prepared data, for hosts that share no file system; `None` where they see the run directory.
    """

    def __init__(self, job: Job, printer: Printer, data: str | None = None) -> None:
        self._job, self._printer, self._data = job, printer, data
        self._failures: Counter[str] = Counter()
        self._lost: str | None = None
        hang_s = job.spec.recovery.hang_s
        self._watch = None if hang_s is None else StepWatch(hang_s)
        self._in_vain = 0
        """Attempts in a row that made no steps."""
        self._names: dict[str, str] = {}
        """Hosts of the cluster file by the names that they have for themselves."""
        self._wrong: dict[str, WorkerLostError] = {}
        """Hosts whose devices computed wrongly, and are left out."""
        self._began = time.monotonic()
        directory = job.local_directory
        self._left = set[str]() if directory is None else set(hosts_of_a_killed_supervisor(directory / "train"))

    async def run(self) -> None:
        """Run the job to its good end.

        Raises:
            CherryError: a user error, or the last attempt's.
        """
        recovery = self._job.spec.recovery
        for number in range(1, recovery.attempts + 1):
            began = time.monotonic()
            cause = await self._attempt(number)
            if cause is None:
                return
            assert cause.error is not None
            self._failures[cause.host] += 1
            self._lost = cause.host if cause.host_is_lost else None
            if isinstance(cause.error, HardwareError):
                self._leave_out(cause.error)
            if not is_retryable_exit_code(cause.error.exit_code) or number == recovery.attempts:
                raise cause.error
            backoff = min(recovery.backoff_s * 2 ** max(0, self._in_vain - 1), _MAX_BACKOFF_S)
            # What went by while the hosts were waited for counts.
            left = backoff - max(0.0, time.monotonic() - began - cause.after_s)
            self._printer.put(f"attempt {number} of {recovery.attempts} ended: {cause.error}")
            await asyncio.sleep(max(0.0, left))

    async def _attempt(self, number: int) -> Ending | None:
        """Cause of an attempt's failure; `None` when the job has ended well."""
        began = time.monotonic()
        self._in_vain += 1
        try:
            sessions = await self._take_hosts()
            files = None if self._data is None else await self._equip(sessions, self._data)
        except OperationalError as error:
            return Ending("the cluster", None, error, time.monotonic() - began)
        hosts = [session.node.host for session in sessions]
        self._names |= {session.facts.hostname: session.node.host for session in sessions if session.facts is not None}
        port = start_launchers(self._job, sessions)
        self._printer.put(f"attempt {number} of {self._job.spec.recovery.attempts} on {', '.join(hosts)} (port {port})")
        self._record(attempt=number, event="began", hosts=hosts, port=port)
        directory = self._job.local_directory
        if self._watch is not None:
            self._watch.begin()
        logs = None if directory is None else RankLogs(directory / "train", len(hosts) * self._job.ranks_per_node)
        carrier = None if files is None else Carrier(files, self._printer.put)
        try:
            cause = await Attempt(sessions, self._printer, self._watch, logs, carrier).run()
        except asyncio.CancelledError:
            self._record(attempt=number, event="ended", error="the supervisor was told to end")
            raise
        if self._watch is None or self._watch.has_steps:
            self._in_vain = 0
        if cause is None:
            self._record(attempt=number, event="ended")
        else:
            told = {"host": cause.host, "code": cause.code, "error": str(cause.error)}
            self._record(attempt=number, event="ended", after_s=round(cause.after_s, 1), **told)
        return cause

    async def _take_hosts(self) -> list[Session]:
        # A host that was just lost would be waited for, and is asked only where the others are too few.
        able = [node for node in self._job.candidates if node.host not in self._wrong]
        others = [node for node in able if node.host != self._lost]
        gathered = await gather(self._job, others)
        if len(gathered.sessions) < self._job.nodes and len(others) < len(able):
            await gathered.close()
            gathered = await gather(self._job, able)
        left_out = [Refusal(host, error) for host, error in self._wrong.items()]
        gathered = Gathered(gathered.sessions, [*gathered.refusals, *left_out])
        for refusal in gathered.refusals:
            self._printer.put(f"not taken: {refusal.error}")
        taken: list[Session] = []
        try:
            taken = choose(self._job, gathered, self._failures)
        finally:
            await gathered.close(kept=taken)
        await self._outwait_a_killed_supervisor({session.node.host for session in gathered.sessions})
        return taken

    async def _equip(self, sessions: Sequence[Session], data: str) -> list[HostFiles]:
        """The hosts' own run directories, filled with what their ranks read; one that fails closes all sessions."""
        try:
            return await asyncio.gather(*(self._fill(rank, one, data) for rank, one in enumerate(sessions)))
        except BaseException:
            await asyncio.gather(*(session.close() for session in sessions))
            raise

    async def _fill(self, rank: int, session: Session, data: str) -> HostFiles:
        job, facts = self._job, session.facts
        there, here = job.host_directory, job.local_directory
        assert facts is not None and there is not None and here is not None
        try:
            files = HostFiles(session.node.host, await session.open_files(), there, here)
            await files.begin(names_for(rank, facts.hostname))
            await session.fetch_data(data, f"{there}/{DATA_FOLDER}", job.environment(session.node, None))
        except CherryError:
            self._failures[session.node.host] += 1  # another one comes first now
            raise
        return files

    def _leave_out(self, error: HardwareError) -> None:
        for name in error.hosts:
            host = self._names.get(name, name)
            self._wrong[host] = WorkerLostError(f"{host}: is left out, as a device there computed wrongly: {error}")

    async def _outwait_a_killed_supervisor(self, answering: set[str]) -> None:
        """Wait until no rank of an earlier supervisor is left: those that it could reach ended with its connections."""
        if self._left:
            lease = 0.0 if self._left <= answering else LEASE_S + LEASE_MARGIN_S
            left = max(0.0, self._began + lease + KILL_S - time.monotonic())
            self._printer.put(f"an earlier supervisor of this run was killed: waiting {left:.0f} s for its last ranks")
            await asyncio.sleep(left)
            self._left = set()

    def _record(self, **event: object) -> None:
        directory = self._job.local_directory
        if directory is not None:
            append_json(directory / "train" / ATTEMPTS_FILE, {**event, "time": time.time()})


def hosts_of_a_killed_supervisor(directory: Path) -> list[str]:
    """Hosts of an attempt that began and has no end on record; `directory` is `train/` of the run directory."""
    records = read_lines(directory / ATTEMPTS_FILE)
    newest = as_record(_Began, records[-1]) if records else None
    return newest.hosts if newest is not None and newest.event == "began" else []


def supervise(job: Job) -> None:
    """Run a job to its end. SIGTERM and SIGINT end it on every host.

    Raises:
        CherryError: see `Supervisor.run`.
        SystemExit: a signal ended it.
    """
    if parent := os.environ.get("CHERRY_PARENT"):
        die_with_parent(signal.SIGTERM, int(parent))
    data = None if job.spec.ssh.runs_directory is None else publish(job)
    printer, got = Printer(), list[int]()

    async def until_signal() -> None:
        running = asyncio.create_task(Supervisor(job, printer, data).run())

        def cancel(number: int) -> None:
            got.append(number)
            running.cancel()

        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, cancel, number)
        with suppress(asyncio.CancelledError):
            await running

    try:
        asyncio.run(until_signal())
    finally:
        printer.close()
    if got:
        print(
            f"ended by {signal.Signals(got[0]).name}, on all hosts. Run the same command again to resume.",
            file=sys.stderr,
        )
        raise SystemExit(128 + got[0])


def main(arguments: Sequence[str] | None = None) -> None:
    """Run `cherry-launch --cluster`, and exit with the code of the error that ended the job."""
    outlive_output()
    raise SystemExit(run_program(lambda: supervise(parse_job(sys.argv[1:] if arguments is None else list(arguments)))))


if __name__ == "__main__":
    main()
