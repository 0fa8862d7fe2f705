"""The sbatch script of a job: srun starts one launcher a node, and cherry/slurm/attempt.py decides what comes after."""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from base.errors import ConfigError
from cherry.cluster import ClusterSpec
from cherry.job_config import NETWORK_VARIABLE
from cherry.remote.job import Job

FOLDER = "slurm"
"""Folder in `train/` of the run directory with the script, the job's output and the records of its starts."""
# sbatch replaces % in file names, and takes blanks and quotes apart.
_PATH = re.compile(r"[\w./+@:,=~-]+")
_BODY = """\
# Slurm sends USR1 before the time limit: the ranks save a checkpoint and end by USR2, and the job is queued again.
told=
trap told=--told USR1
"$python" -P -m cherry.slurm.attempt begin --records="$records" --requeues={requeues} || exit

# Rank 0 is on the first node. Each start has a port of its own, since the one before may still hold its.
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((20000 + (SLURM_JOB_ID * 37 + start) % 10000))
# One launcher a node. The first that fails ends the others.
srun --ntasks-per-node=1 --kill-on-bad-exit=1 --cpu-bind=none --unbuffered bash -c '
    trap "" USR2  # until the launcher handles it
    export CHERRY_ERROR_FILE="$records.$start.$SLURM_NODEID.error.json"
    [ "$SLURM_NODEID" != 0 ] || export CHERRY_PROGRESS_FILE="$records.progress.jsonl"
    exec "$python" -P -m cherry.launcher --node_rank="$SLURM_NODEID" "$@"' launcher \\
    --nnodes={nodes} --nproc_per_node={ranks} --master_addr="$head" --master_port="$port" --max-restarts=0 \\
    {program} &
step=$!
while [ -z "$told" ] && kill -0 "$step" 2>/dev/null; do wait "$step"; done  # a signal interrupts wait
while kill -0 "$step" 2>/dev/null; do scancel --signal=USR2 "$SLURM_JOB_ID"; sleep 2; done  # ranks may begin only now
wait "$step"
exec "$python" -P -m cherry.slurm.attempt end --records="$records" --requeues={requeues} --code=$? $told
"""


@dataclass(frozen=True)
class SlurmJob:
    """A training program as a Slurm job."""

    job: Job
    name: str
    """The job's name, unique to the run directory, so that the job is found again by name alone."""
    directory: Path
    """Absolute path of the run directory, which all nodes share."""

    @property
    def folder(self) -> Path:
        """Folder of the script, the output and the records."""
        return self.directory / "train" / FOLDER

    @property
    def script_file(self) -> Path:
        """File of the script."""
        return self.folder / "job.sbatch"

    def output_file(self, job_id: str) -> Path:
        """File with the output of all starts of a job."""
        return self.folder / f"{job_id}.out"

    def records(self, job_id: str) -> Path:
        """Path that the records of a job's starts begin with; see cherry/slurm/attempt.py."""
        return self.folder / job_id


def render(slurm: SlurmJob, *, working_directory: str | None = None) -> str:
    """Text of the job's sbatch script.

    Args:
        working_directory: of the program; `None` is this process's.

    Raises:
        ConfigError: a path cannot be written in an sbatch option.
    """
    spec, options = slurm.job.spec, slurm.job.spec.slurm
    place = working_directory or os.getcwd()
    for path in (str(slurm.directory), place):
        if not _PATH.fullmatch(path):
            raise ConfigError(
                f"{path}: sbatch takes only letters, digits and ./+@:,=~_- in the paths of a job, here the run "
                "directory and the working directory. Choose another place for the run (runs_directory=...)."
            )
    network = json.dumps(spec.communication.given())
    body = _BODY.format(
        requeues=options.requeues,
        nodes=slurm.job.nodes,
        ranks=slurm.job.ranks_per_node,
        program=shlex.join(slurm.job.program),
    )
    lines = [
        "#!/bin/bash",
        *(f"#SBATCH {option}" for option in _options(slurm, spec, place)),
        "",
        *options.setup,
        f"export python={shlex.quote(options.python or sys.executable)} PYTHONUNBUFFERED=1",
        f"export {NETWORK_VARIABLE}={shlex.quote(network)}",
        f"export records={slurm.folder}/$SLURM_JOB_ID start=${{SLURM_RESTART_COUNT:-0}}",
        "",
        body,
    ]
    return "\n".join(lines)


def _options(slurm: SlurmJob, spec: ClusterSpec, place: str) -> Iterator[str]:
    """Options of sbatch, in the order of the script."""
    options = spec.slurm
    yield f"--job-name={slurm.name}"
    given = {"partition": options.partition, "account": options.account, "qos": options.qos, "time": options.time}
    yield from (f"--{name}={value}" for name, value in given.items() if value is not None)
    yield f"--nodes={slurm.job.nodes}"
    yield "--ntasks-per-node=1"
    if spec.has_gpus:
        yield f"--gpus-per-node={slurm.job.ranks_per_node}"
    if options.exclusive:
        yield "--exclusive"
        yield "--mem=0"  # all of it: --exclusive is of cores and GPUs only
    if options.exclude:
        yield f"--exclude={','.join(options.exclude)}"
    yield f"--chdir={place}"
    yield f"--output={slurm.folder}/%j.out"
    yield "--open-mode=append"
    yield "--requeue"
    yield f"--signal=B:USR1@{options.warning_s}"
    yield from options.options
