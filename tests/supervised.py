"""Jobs on several hosts, started by `cherry-launch --cluster`."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import yaml

from tests.hosts import LabHosts
from tests.processes import command_line
from tests.training_job import ROOT, Job

DEADLINE_S = 480.0
# At a constant rate, so that every run has the losses of the unbroken one.
FLAGS = ("--steps=32", "--set", "train.schedule=constant")


def until(condition: Callable[[], Any], what: str) -> Any:
    """The first true value of a condition."""
    deadline = time.monotonic() + DEADLINE_S
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not in {DEADLINE_S} s: {what}"
        time.sleep(0.05)
    return value


class Supervised:
    """A job of `make_job` on hosts, started by `cherry-launch --cluster`."""

    def __init__(self, job: Job, hosts: LabHosts, environment: dict[str, str]) -> None:
        self.job, self.hosts = job, hosts
        self._environment = {**environment, "HOME": str(hosts.home)}
        self._log = job.directory.parent / f"{job.directory.name}.log"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, *flags: str, nodes: int = 2, program: str = "train.py", **cluster: Any) -> subprocess.Popen[bytes]:
        """Start it on the first nodes, which the cluster file names, with other keys for that file."""
        spec = self.job.directory.parent / "cluster.yaml"
        named = [{"host": name} for name in self.hosts.names[:nodes]]
        spec.write_text(yaml.safe_dump({"nodes": named, **cluster}))
        command = [
            sys.executable,
            "-m",
            "cherry.remote.supervisor",
            f"--cluster={spec}",
            f"--nnodes={nodes}",
            program,
        ]
        command += ["--config", str(self.job.config), "--run_dir", str(self.job.directory), *FLAGS, *flags]
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                command, cwd=ROOT, env=self._environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        return self._process

    def code(self) -> int:
        """Exit code of the supervisor, once it has ended."""
        assert self._process is not None
        return self._process.wait(timeout=DEADLINE_S)

    @property
    def output(self) -> str:
        return self._log.read_text()

    @property
    def attempts(self) -> list[dict[str, Any]]:
        """The lines of attempts.jsonl."""
        path = self.job.directory / "train" / "attempts.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    @property
    def events(self) -> list[tuple[Any, ...]]:
        """(begin or end, hosts or the one that failed) of each line of attempts.jsonl."""
        return [(line["event"], line.get("hosts", line.get("host"))) for line in self.attempts]

    def wait_for_checkpoint(self, step: int) -> None:
        until((self.job.checkpoint(step) / "COMMITTED").exists, f"checkpoint of step {step}; {self.output}")

    def left(self) -> list[str]:
        """Command lines of what runs on the hosts."""
        found = [command_line(one) for name in self.hosts.names for one in self.hosts.processes(name)]
        return [" ".join(words) for words in found if words]

    def end(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait()
