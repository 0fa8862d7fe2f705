"""Slurm's own programs: sbatch, squeue, scontrol and scancel, and what their failures mean."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass

from base.errors import ConfigError, ServiceError

PROGRAMS = ("sbatch", "squeue", "scontrol", "scancel")
_TIMEOUT_S = 60.0
# An answer takes some hundredths of a second, on a controller with thousands of jobs a second.
_SILENT_S = 3.0
_WAIT = "Ask `scontrol ping`, and start the same command again once the controller is up."
_CONFIGURE = (
    "Start the run on a login node of the cluster; or copy that node's /etc/slurm/slurm.conf here, and name it by "
    "SLURM_CONF if it lies elsewhere."
)
# Neither a file, nor a server that hands it out.
_NOT_CONFIGURED = re.compile(r"DNS SRV lookup failed|slurm\.conf: No such file|Unable to process configuration file")
_NO_SOURCE = "Could not establish a configuration source"
# What slurm_strerror(3) has for a controller that does not answer, or not now.
_NOT_NOW = re.compile(
    "Unable to contact|Connection refused|connect failure|timed out|Zero Bytes|temporarily|try again|backup mode", re.I
)
_UNKNOWN_JOB = "Invalid job id"
# Of the program that submits, and of a job that it may run in itself.
_NOT_PASSED_ON = ("PREFECT_", "MLFLOW_", "CHERRY_", "SLURM_", "SBATCH_")
FORGOTTEN = "FORGOTTEN"
"""State of a job that the controller does not know any more; Slurm has no name for it."""
_ENDED = frozenset(
    (
        *(FORGOTTEN, "BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED"),
        *("NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "TIMEOUT"),
    )
)


@dataclass(frozen=True)
class JobState:
    """What the controller says of a job."""

    state: str
    """squeue's name, like PENDING."""
    reason: str
    """Why it waits, or ended."""
    nodes: str
    """Its nodes as Slurm writes them, like `node[1-2]`; empty while it has none."""
    restarts: int
    exit_code: int
    """Of the batch script."""
    excluded: str
    """Nodes that it may not run on."""

    @property
    def has_ended(self) -> bool:
        """Whether it never runs again."""
        return self.state in _ENDED


def missing_programs() -> list[str]:
    """Those of Slurm's programs that are not on PATH."""
    return [name for name in PROGRAMS if shutil.which(name) is None]


def submit(script: str, *, test_only: bool = False) -> str:
    """Id of the submitted job; with `test_only` nothing is submitted, and the id is empty.

    Args:
        script: text of the sbatch script.

    Raises:
        ConfigError: Slurm refuses such a job, whenever it is asked.
        ServiceError: the controller does not answer now.
    """
    environment = {key: value for key, value in os.environ.items() if not key.startswith(_NOT_PASSED_ON)}
    if "SLURM_CONF" in os.environ:
        environment["SLURM_CONF"] = os.environ["SLURM_CONF"]
    flag = "--test-only" if test_only else "--parsable"
    # sbatch --parsable prints ID, or ID;CLUSTER.
    output = _call("sbatch", flag, "--export=ALL", given=script, environment=environment)
    return "" if test_only else output.strip().partition(";")[0]


def show(job_id: str, *, announce: bool = True) -> JobState | None:
    """State of a job; `None` when the controller does not know it (any more).

    Args:
        announce: whether the terminal is told when the controller lets wait.

    Raises:
        ServiceError: the controller does not answer now.
    """
    try:
        line = _call("scontrol", "show", "job", job_id, "--oneliner", announce=announce)
    except ConfigError as error:
        if _UNKNOWN_JOB in str(error):
            return None
        raise
    values = dict(re.findall(r"(?:^|\s)(\w+)=(\S*)", line))
    nodes, excluded = values.get("NodeList", ""), values.get("ExcNodeList", "")
    return JobState(
        state=values["JobState"],
        reason=values.get("Reason", ""),
        nodes="" if nodes == "(null)" else nodes,
        restarts=int(values.get("Restarts", 0)),
        exit_code=int(values.get("ExitCode", "0:0").partition(":")[0]),
        excluded="" if excluded == "(null)" else excluded,
    )


def jobs_named(name: str) -> list[str]:
    """Ids of this user's jobs of a name that are queued, run, or are being ended.

    Raises:
        ServiceError: the controller does not answer now.
    """
    return _call("squeue", "--me", "--noheader", "--format=%i", f"--name={name}").split()


def hosts_of(nodes: str) -> list[str]:
    """Names of nodes that are written as Slurm does, like `node[1-2]`."""
    return _call("scontrol", "show", "hostnames", nodes).split()


def cancel(job_id: str) -> None:
    """End a job for good: never queued again, also when a node is lost at the same time. Of one that ended, nothing.

    Raises:
        ServiceError: the controller does not answer now.
    """
    for command in (("scontrol", "update", f"JobId={job_id}", "Requeue=0"), ("scancel", job_id)):
        try:
            _call(*command)
        except ConfigError:  # it has ended meanwhile
            continue


def requeue(job_id: str) -> None:
    """Queue a running job again.

    Raises:
        ConfigError: Slurm does not allow it (it was cancelled).
        ServiceError: the controller does not answer now.
    """
    _call("scontrol", "requeue", job_id)


def exclude(job_id: str, nodes: str) -> None:
    """Let a queued job not run on `nodes`, in place of those that were excluded before.

    Raises:
        ConfigError, ServiceError: see `requeue`.
    """
    _call("scontrol", "update", f"JobId={job_id}", f"ExcNodeList={nodes}")


def _call(
    program: str, *arguments: str, given: str = "", environment: dict[str, str] | None = None, announce: bool = True
) -> str:
    """Output of one of Slurm's programs; when it lets wait, a line on the terminal says for what and until when.

    Args:
        given: its standard input.
        announce: whether that is said.

    Raises:
        ConfigError: it refuses, is not here, or is not configured.
        ServiceError: the controller does not answer.
    """
    conf = os.environ.get("SLURM_CONF")
    if conf is not None and not os.path.exists(conf):  # which Slurm waits for, a minute
        raise ConfigError(f"SLURM_CONF names {conf}, which does not exist. {_CONFIGURE}")
    try:
        with subprocess.Popen(
            [program, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            env=environment,
        ) as process:
            output, errors = _answer(process, program, given, announce=announce)
    except FileNotFoundError as error:
        raise ConfigError(
            f"no {program} on this machine. Start the run where Slurm's programs are, on a login node of the cluster."
        ) from error
    if process.returncode == 0:
        return output
    told = " ".join(line.removeprefix(f"{program}: ").removeprefix("error: ") for line in errors.splitlines())
    if _NOT_CONFIGURED.search(told) or (_NO_SOURCE in told and not _NOT_NOW.search(told)):
        raise ConfigError(f"{program}: Slurm is installed here, and not configured ({told}). {_CONFIGURE}")
    if _NOT_NOW.search(told):  # also where the controller hands the configuration out
        raise ServiceError(f"{program}: Slurm's controller does not answer: {told}. {_WAIT}")
    raise ConfigError(f"{program} refuses: {told or f'exit code {process.returncode}'}")


def _answer(process: subprocess.Popen[str], program: str, given: str, *, announce: bool) -> tuple[str, str]:
    """Standard output and standard error of a program that has ended.

    Raises:
        ServiceError: it did not within a minute.
    """
    try:
        try:
            return process.communicate(given, timeout=_SILENT_S)
        except subprocess.TimeoutExpired:
            until = time.strftime("%H:%M:%S", time.localtime(time.time() + _TIMEOUT_S - _SILENT_S))
            note = f"waiting for Slurm's controller, which does not answer {program}, until {until} at most"
            if announce:
                print(note, file=sys.stderr, flush=True)
        return process.communicate(timeout=_TIMEOUT_S - _SILENT_S)
    except subprocess.TimeoutExpired as error:
        raise ServiceError(f"{program}: no answer from Slurm's controller in {_TIMEOUT_S:.0f} s. {_WAIT}") from error
    finally:
        process.kill()  # which does nothing once it has ended
        process.wait()  # after Ctrl-C nobody else does
