"""Jobs under Slurm, submitted by `cherry.slurm.submit`."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import yaml

from tests.slurm import SlurmLab
from tests.supervised import FLAGS, Supervised, until
from tests.training_job import ROOT, Job


class Queued(Supervised):
    """A job that `cherry.slurm.submit` has submitted."""

    def __init__(self, job: Job, lab: SlurmLab, environment: dict[str, str]) -> None:
        super().__init__(job, lab.hosts, {**environment, "SLURM_CONF": str(lab.conf)})
        self.lab = lab

    def start(self, *flags: str, nodes: int = 2, **cluster: Any) -> subprocess.Popen[bytes]:
        """Submit it; `cluster` is keys of `slurm` in the cluster file."""
        program = ["train.py", "--config", str(self.job.config), "--run_dir", str(self.job.directory), *FLAGS, *flags]
        return self.start_program(program, nodes=nodes, **cluster)

    def start_program(self, program: list[str], *, nodes: int, **cluster: Any) -> subprocess.Popen[bytes]:
        spec = self.job.directory.parent / "cluster.yaml"
        spec.write_text(yaml.safe_dump({"provider": "slurm", "nodes": 3, "slurm": cluster}))
        command = [sys.executable, "-m", "cherry.slurm.submit", f"--cluster={spec}", f"--nnodes={nodes}", "--name=job"]
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [*command, *program], cwd=ROOT, env=self._environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        return self._process

    def left(self) -> list[str]:
        return self.lab.left()

    @property
    def slurm_job(self) -> dict[str, str]:
        """What the controller tells of the job."""
        return until(self.lab.jobs, "the job is queued")[-1]

    @property
    def all_output(self) -> str:
        """What was printed, and what Slurm's daemons wrote."""
        return f"{self.output}\n{self.lab.logs()}"
