"""Begin and end of a start of a Slurm job, called by its script on the first node.

    python -m cherry.slurm.attempt begin --records=PATH --requeues=20
    python -m cherry.slurm.attempt end --records=PATH --requeues=20 --code=34 [--told]

The end decides by the launchers' errors: a job that was told to end, or ended by a transient error, is queued again,
without nodes that compute wrongly; a user error, a bug or a cancelled job is not.
"""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from base import storage
from base.errors import (
    USER_EXIT_CODES,
    ArgumentParser,
    CherryError,
    ConfigError,
    HardwareError,
    ServiceError,
    StoppedError,
    SupersededError,
    WorkerLostError,
    error_of_code,
    error_record,
    is_retryable_exit_code,
    read_error,
    run_program,
)
from base.json_lines import append_json
from base.lost_output import outlive_output
from cherry.remote.job import ATTEMPTS_FILE
from cherry.slurm import commands

# What the signals that end a job on purpose end srun with.
_CANCELLED = {128 + number for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)}


class Start:
    """This start of the job.

    Args:
        records: path that the records of the job's starts begin with.
        requeues: times that the job may start again.
    """

    def __init__(self, records: Path, requeues: int) -> None:
        self._records, self._requeues = records, requeues
        self._job_id = os.environ["SLURM_JOB_ID"]
        self._number = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
        self._nodes = os.environ["SLURM_JOB_NODELIST"]
        self._attempts = records.parent.parent / ATTEMPTS_FILE

    def begin(self) -> None:
        """Record the begin.

        Raises:
            WorkerLostError: the job was queued again too often, by Slurm itself after nodes were lost.
        """
        if self._number > self._requeues:
            error = WorkerLostError(
                f"the job was started again {self._requeues} times (slurm.requeues) without an end. Look for the cause "
                f"in {self._attempts}, then start the same command again to resume."
            )
            self._end(error.exit_code, error, requeued=False)
            raise error
        ended_file(self._records).unlink(missing_ok=True)
        hosts = commands.hosts_of(self._nodes)
        self._record(event="began", hosts=hosts)
        print(f"start {self._number + 1} of job {self._job_id} on {', '.join(hosts)}", flush=True)

    def end(self, code: int, *, told: bool) -> int:
        """Exit code for the script, after the job was queued again if it shall be.

        Args:
            code: srun's exit code, the highest of its tasks.
            told: the time limit is near.
        """
        if code == 0:
            self._end(0, None, requeued=False)
            return 0
        cause = self._cause()
        error = cause[1] if cause is not None else error_of_code(code, self._told(code))
        # A launcher that is killed outright writes no error, and srun ends the others before they write theirs.
        transient = is_retryable_exit_code(error.exit_code) and error.exit_code not in _CANCELLED
        again = ((told and error.exit_code not in USER_EXIT_CODES) or transient) and not self._is_cancelled()
        if again and self._number >= self._requeues:
            again, error = False, _final(error, self._requeues)
        host = None if cause is None or isinstance(error, StoppedError) else cause[0]
        self._end(error.exit_code, error, requeued=again, host=host)
        if again:
            print(f"queued again after: {error}", flush=True)
            try:
                self._requeue(error)
            except ConfigError as refused:  # the job was cancelled at this moment
                print(f"not queued again: {refused}", flush=True)
                self._write_end(error.exit_code, error, requeued=False)
        return error.exit_code

    def _is_cancelled(self) -> bool:
        """Whether the job was cancelled: Slurm may kill its ranks then, and `scontrol requeue` would bring it back."""
        with suppress(ServiceError):
            state = commands.show(self._job_id)
            return state is not None and state.state.startswith("CANCELLED")
        return False

    def _cause(self) -> tuple[str, CherryError] | None:
        """(host, error) of the launcher that explains the others' ends; `None` where none wrote an error.

        A user error comes first, then the earliest.
        """
        found = []
        hosts = commands.hosts_of(self._nodes)
        for number, host in enumerate(hosts):
            path = Path(f"{self._records}.{self._number}.{number}.error.json")
            if (error := read_error(path)) is not None:
                user = error.exit_code in USER_EXIT_CODES or isinstance(error, SupersededError)
                found.append((not user, path.stat().st_mtime, host, error))
        return min(found, key=lambda item: item[:2])[2:] if found else None

    def _told(self, code: int) -> str:
        if code == 128 + signal.SIGTERM:
            return "the job's step was ended by SIGTERM, so it is not started again"
        return f"srun ended with exit code {code}; see {self._records}.out and train/rank-*.log"

    def _requeue(self, error: CherryError) -> None:
        """Queue the job again, then leave out nodes that compute wrongly: Slurm changes those of queued jobs only."""
        named = {name.partition(".")[0] for name in error.hosts} if isinstance(error, HardwareError) else set()
        bad = [host for host in commands.hosts_of(self._nodes) if host.partition(".")[0] in named]
        known = commands.show(self._job_id) if bad else None
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # queueing ends this script, which has seconds left
        commands.requeue(self._job_id)
        if known is None:
            return
        with suppress(ConfigError, ServiceError):  # the job then may meet them again, and fail again
            commands.exclude(self._job_id, ",".join(filter(None, [known.excluded, *bad])))
            print(f"left out from now on: {', '.join(bad)}", flush=True)

    def _end(self, code: int, error: CherryError | None, *, requeued: bool, host: str | None = None) -> None:
        self._write_end(code, error, requeued=requeued)
        told = {} if error is None else {"host": host, "code": code, "error": str(error)}
        self._record(event="ended", **told)

    def _write_end(self, code: int, error: CherryError | None, *, requeued: bool) -> None:
        record = None if error is None else error_record(error)
        ended = {"restart": self._number, "code": code, "requeued": requeued, "error": record}
        storage.write_json(str(ended_file(self._records)), ended)

    def _record(self, **event: Any) -> None:
        started = {"attempt": self._number + 1, "job": self._job_id}
        append_json(self._attempts, {**started, **event, "time": time.time()})


def ended_file(records: Path) -> Path:
    """File with the end of a job's newest start: restart, code, requeued, error."""
    return Path(f"{records}.ended.json")


def _final(error: CherryError, requeues: int) -> CherryError:
    final = error_of_code(error.exit_code, f"{error} The job was started again {requeues} times (slurm.requeues).")
    if isinstance(final, HardwareError) and isinstance(error, HardwareError):
        final.hosts = error.hosts
    return final


def main() -> None:
    """Run `begin` or `end`; exits with the code that the script exits with."""
    parser = ArgumentParser(prog="cherry.slurm.attempt", description="Begin or end a start of a Slurm job.")
    parser.add_argument("event", choices=("begin", "end"))
    parser.add_argument("--records", type=Path, required=True, help="path that the records begin with")
    parser.add_argument("--requeues", type=int, required=True, help="times that the job may start again")
    parser.add_argument("--code", type=int, default=0, help="srun's exit code")
    parser.add_argument("--told", action="store_true", help="the time limit is near")
    options = parser.parse_args()
    start = Start(options.records, options.requeues)
    if options.event == "begin":
        start.begin()
    else:
        raise SystemExit(start.end(options.code, told=options.told))


if __name__ == "__main__":
    outlive_output()
    raise SystemExit(run_program(main))
