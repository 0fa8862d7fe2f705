"""Submits a job to Slurm, shows its output and its states until it has ended, and cancels it when told to end.

python -m cherry.slurm.submit --cluster cluster.yaml --name NAME train.py --config CONFIG --run_dir DIRECTORY
"""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from base import storage
from base.errors import (
    CherryError,
    ConfigError,
    InvalidInputError,
    MissingFileError,
    ServiceError,
    WorkerLostError,
    error_of_code,
    error_of_record,
    run_program,
)
from base.json_lines import JsonLinesReader
from base.lost_output import outlive_output
from base.progress import print_progress
from cherry.cluster import SLURM
from cherry.launcher import die_with_parent
from cherry.remote.job import build_parser, job_of
from cherry.slurm import commands
from cherry.slurm.attempt import ended_file
from cherry.slurm.commands import FORGOTTEN, JobState
from cherry.slurm.script import SlurmJob, render

# Files are looked at often; the controller, which serves a whole cluster, is asked rarely, until the script has ended.
_TICK_S = 0.5
_ASK_S = 5.0
_ASK_AT_END_S = 1.0
# tasks/processes/process.py gives this program 15 s from SIGTERM to SIGKILL.
_CANCEL_S = 10.0
# Of srun, where someone ended the job's step.
_TERMINATED = 128 + signal.SIGTERM
_JOB_NAME = re.compile(r"[\w.-]+")


class Output:
    """The growing output of a job's starts, printed as it comes; lines of progress with the fraction that they report.

    Args:
        records: path that the records of the job's starts begin with; see cherry/slurm/attempt.py.
    """

    def __init__(self, output_file: Path, records: Path) -> None:
        self._file, self._offset, self._rest = output_file, 0, b""
        self._reports = JsonLinesReader(Path(f"{records}.progress.jsonl"))
        self._fractions: dict[str, float] = {}

    def print_new(self, *, last: bool = False) -> None:
        """Print what was written since the last call; with `last`, also a line without an end."""
        try:
            with self._file.open("rb") as handle:
                handle.seek(self._offset)
                content = handle.read()
        except FileNotFoundError:
            return
        self._offset += len(content)
        finished, _, self._rest = (self._rest + content).rpartition(b"\n")
        lines = finished.split(b"\n") if finished else []
        if last and self._rest:
            lines.append(self._rest)
        if lines:  # a report is written before its line
            self._fractions |= {one["line"]: one["fraction"] for one in self._reports.read_new() or [] if "line" in one}
        for line in lines:
            text = line.decode(errors="replace")
            fraction = self._fractions.pop(text, None)
            print(text, flush=True) if fraction is None else print_progress(text, fraction)


class Follower:
    """A submitted job: its output, its states, its end."""

    def __init__(self, slurm: SlurmJob, job_id: str) -> None:
        self._job_id = job_id
        self._records = slurm.records(job_id)
        self._log = slurm.output_file(job_id)
        self._output = Output(self._log, self._records)
        self._shown = ""
        self._asked = -_ASK_S
        self._silent = False

    def follow(self) -> JobState:
        """State of the job once it has ended; its output is printed until then."""
        ended = 0
        while True:
            self._output.print_new()
            now = time.monotonic()
            if now - self._asked >= (_ASK_AT_END_S if ended or self._says_ended() else _ASK_S):
                self._asked = now
                known = self._state()
                # A job that is queued again may for a moment be shown as one that has ended.
                ended = ended + 1 if known is not None and known.has_ended else 0
                if known is not None and (ended > 1 or known.state == "COMPLETED"):
                    self._output.print_new(last=True)
                    return known
            time.sleep(_TICK_S)

    def _says_ended(self) -> bool:
        """Whether the script has ended and the job was not queued again; costs no question to the controller."""
        record = self._end_record()
        return record is not None and not record["requeued"]

    def _end_record(self) -> dict[str, Any] | None:
        try:
            record: dict[str, Any] = storage.read_json(str(ended_file(self._records)))
        except (MissingFileError, ValueError):
            return None
        return record

    def _state(self) -> JobState | None:
        """State of the job; `None` where the controller does not answer. One that it has forgotten has ended."""
        try:
            known = commands.show(self._job_id, announce=not self._silent)
        except ServiceError as error:
            if not self._silent:
                print(f"waiting for Slurm's controller: {error}", flush=True)
            self._silent = True
            return None
        self._silent = False
        if known is None:
            done = (self._end_record() or {}).get("code") == 0
            known = JobState("COMPLETED" if done else FORGOTTEN, "Slurm does not know it any more", "", 0, 0, "")
        what = f"{known.state} on {known.nodes}" if known.nodes else f"{known.state} ({known.reason})"
        again = f", start {known.restarts + 1}" if known.restarts else ""
        if what + again != self._shown:
            self._shown = what + again
            print(f"job {self._job_id}: {self._shown}", flush=True)
        return known

    def conclude(self, known: JobState) -> None:
        """Raise the error that a job's last state and records tell of, if any.

        Raises:
            InvalidInputError: someone cancelled it.
            CherryError: the error that ended it.
        """
        if known.state == "COMPLETED":
            return
        record = self._end_record()
        if known.state == "CANCELLED" or (record is not None and record["code"] == _TERMINATED):
            raise InvalidInputError(
                f"Slurm job {self._job_id} was cancelled, so it is not started again. Start the same command again to "
                "resume from the newest checkpoint."
            )
        if record is not None and not record["requeued"] and record["code"]:
            code, told = record["code"], error_of_record(record["error"])
            raise told or error_of_code(code, f"Slurm job {self._job_id} ended with exit code {code}; see {self._log}")
        if known.state == "FAILED":
            text = f"Slurm job {self._job_id} ended before training began, or without a word of it ({known.reason}"
            raise error_of_code(known.exit_code or 1, f"{text}, exit code {known.exit_code}); see {self._log}")
        hint = "; raise slurm.warning_s, so that a step and a save fit in" if known.state == "TIMEOUT" else ""
        raise WorkerLostError(
            f"Slurm ended job {self._job_id}: {known.state} ({known.reason}){hint}. Start the same command again to "
            f"resume from the newest checkpoint; the job's output is {self._log}."
        )


def cancel_named(name: str, *, wait_s: float | None = 0.0) -> bool:
    """Whether no job of this name is left, after cancelling all.

    Args:
        wait_s: most seconds to wait until they are gone; `None` waits as long as it takes.

    Raises:
        ServiceError: the controller does not answer.
    """
    began = time.monotonic()
    told = set[str]()
    while left := set(commands.jobs_named(name)):
        for job_id in left - told:
            commands.cancel(job_id)
            print(f"cancelled Slurm job {job_id} ({name})", flush=True)
        if not told and wait_s is None:
            print("waiting until its last processes are gone", flush=True)
        told |= left
        if wait_s is not None and time.monotonic() - began >= wait_s:
            return False
        time.sleep(_TICK_S)
    return True


def submit_and_follow(slurm: SlurmJob) -> None:
    """Run a job to its end. It ends with this program: on SIGTERM, SIGINT or an error, it is cancelled.

    Raises:
        CherryError: Slurm refuses the job, or the error that ended it.
        SystemExit: a signal ended this program.
    """
    script = render(slurm)
    cancel_named(slurm.name, wait_s=None)  # of a program that was killed
    storage.write_bytes(str(slurm.script_file), script.encode())
    try:
        job_id = commands.submit(script)
        print(f"submitted Slurm job {job_id} ({slurm.name}); its output is {slurm.output_file(job_id)}", flush=True)
        follower = Follower(slurm, job_id)
        known = follower.follow()
    except BaseException:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        try:  # by its name: a signal may have come between the submission and its answer
            cancel_named(slurm.name, wait_s=_CANCEL_S)
        except CherryError as error:
            print(f"the job may go on, cancel it by `scancel --name={slurm.name}`: {error}", file=sys.stderr)
        raise
    follower.conclude(known)


def parse_slurm(arguments: Sequence[str]) -> SlurmJob:
    """The job of a command line.

    Raises:
        MissingFileError, ConfigError: a flag or the cluster file is wrong, or the run directory is not a directory.
    """
    options = build_parser().parse_args(arguments)
    job = job_of(options)
    if job.spec.provider != SLURM:
        raise ConfigError(f"{options.cluster}: its provider must be {SLURM} (got {job.spec.provider})")
    directory = job.run_directory
    if directory is None or not storage.is_local(directory):
        raise ConfigError("a Slurm job needs --run_dir, on a file system that all nodes share")
    path = Path(storage.local_path(directory)).resolve()
    # Jobs of this name are cancelled first: it must be the run directory's own.
    folder = re.sub(r"[^\w.-]", "-", path.name)
    own = f"cherry-{folder}-{storage.fingerprint(str(path))[:8]}"
    name = own if options.name is None else options.name
    if not _JOB_NAME.fullmatch(name):
        raise ConfigError(f"cherry-launch: --name must be letters, digits and .-_ (got {name!r})")
    return SlurmJob(job, name, path)


def _stop(number: int, _frame: object) -> NoReturn:
    print(f"ended by {signal.Signals(number).name}: cancelling the job", file=sys.stderr, flush=True)
    raise SystemExit(128 + number)


def launch(arguments: Sequence[str]) -> None:
    """Submit and follow the job of a command line. It is cancelled when this program or its parent ends.

    Raises:
        CherryError: see `parse_slurm` and `submit_and_follow`.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _stop)
    if parent := os.environ.get("CHERRY_PARENT"):
        die_with_parent(signal.SIGTERM, int(parent))
    submit_and_follow(parse_slurm(arguments))


def check(slurm: SlurmJob) -> None:
    """Check that Slurm would take the job; submits nothing.

    Raises:
        ConfigError: it never would, as with an unknown partition or more nodes than there are.
        ServiceError: the controller does not answer now.
    """
    if missing := commands.missing_programs():
        raise ConfigError(
            f"provider slurm: no {', '.join(missing)} on this machine. Start the run where Slurm's programs are, on a "
            "login node of the cluster."
        )
    commands.submit(render(slurm), test_only=True)


if __name__ == "__main__":
    outlive_output()
    raise SystemExit(run_program(lambda: launch(sys.argv[1:])))
