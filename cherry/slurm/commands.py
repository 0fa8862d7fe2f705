"""Slurm's own programs: sbatch, squeue, scontrol and scancel, and what their failures mean."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass

from base.errors import ConfigError, ServiceError

PROGRAMS = ("sbatch", "squeue", "scontrol", "scancel")
_TIMEOUT_S = 60.0
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


def show(job_id: str) -> JobState | None:
    """State of a job; `None` when the controller does not know it (any more).

    Raises:
        ServiceError: the controller does not answer now.
    """
    try:
        line = _call("scontrol", "show", "job", job_id, "--oneliner")
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


def _call(program: str, *arguments: str, given: str = "", environment: dict[str, str] | None = None) -> str:
    """Output of one of Slurm's programs.

    Raises:
        ConfigError: it refuses, or is not here.
        ServiceError: the controller does not answer.
    """
    try:
        ended = subprocess.run(
            [program, *arguments],
            input=given,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_TIMEOUT_S,
            env=environment,
            check=False,
        )
    except FileNotFoundError as error:
        raise ConfigError(
            f"no {program} on this machine. Start the run where Slurm's programs are, on a login node of the cluster."
        ) from error
    except subprocess.TimeoutExpired as error:
        raise ServiceError(f"{program}: no answer from Slurm's controller in {_TIMEOUT_S:.0f} s") from error
    if ended.returncode == 0:
        return ended.stdout
    told = " ".join(line.removeprefix(f"{program}: ").removeprefix("error: ") for line in ended.stderr.splitlines())
    if _NOT_NOW.search(told):
        raise ServiceError(f"{program}: Slurm's controller does not answer: {told}")
    raise ConfigError(f"{program} refuses: {told or f'exit code {ended.returncode}'}")
