"""Faults of Prefect and MLflow on PostgreSQL, and of `cherry run` itself, while it trains beside them."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from benchmarks.chaos.environment import variables
from benchmarks.chaos.record import Fault
from flows.services import start
from flows.services.layout import Ports, Services, open_services
from flows.services.programs import CONFIG_FILE
from tests.object_stores import free_ports
from tests.processes import tree
from tests.project import kill, new_project, wait_for

KINDS = ("MLflow down for a minute", "PostgreSQL killed", "PostgreSQL stopped for a while", "Ctrl-C")
STEPS = 1500  # more than a minute of training is left after a fault
_MLFLOW_AWAY_S, _POSTGRES_AWAY_S = 60.0, 15.0
_INTERRUPTED = 130
_LIMIT_S = 600


@contextmanager
def services() -> Iterator[Services]:
    """Prefect and MLflow on PostgreSQL and an S3 store, whose passwords the environment of this process has."""
    with tempfile.TemporaryDirectory(prefix="cherry-services-", dir="/var/tmp") as name:
        Path(name).chmod(0o755)  # PostgreSQL's own user passes through
        made = open_services(Path(name) / "s", Ports(*free_ports(len(Ports.__dataclass_fields__))))
        try:
            start.up(made, lambda line: print(f"  {line}", flush=True))
            with variables(made.client_environment):
                yield made
        finally:
            start.down(made)


class ServiceCampaign:
    """Runs of one project, each with one fault while it trains."""

    def __init__(self, home: Path, services: Services, choose: random.Random) -> None:
        self._services, self._choose = services, choose
        self._project = new_project(home, services.prefect_url)
        self._project.tracking_uri = services.mlflow_url
        self._project.variables = services.client_environment
        self.faults: list[Fault] = []
        self._running = self._start("unbroken")
        assert self._running.wait() == 0, self._said("unbroken")

    def run(self, kinds: list[str]) -> None:
        """Meet faults of these kinds, each in a run of its own."""
        for number, kind in enumerate(kinds):
            fault, name = Fault(kind, "local"), f"run-{number}"
            self._running = self._start(name)
            at = self._choose.randrange(20, STEPS // 4)
            wait_for(lambda name=name, at=at: len(self._project.metrics(name)) > at, f"training; {self._said(name)}")
            self._inject(fault, name)
            fault.completed = self._running.wait(_LIMIT_S) == 0
            self._compare(fault, name)
            self.faults.append(fault)
            print(f"  {len(self.faults):3d} {fault}", flush=True)

    def close(self) -> None:
        """End the command, if it still runs."""
        kill(self._running)

    def _start(self, name: str) -> subprocess.Popen[bytes]:
        given = (f"name={name}", f"train.steps={STEPS}", "train.schedule=constant", "train.learning_rate=5e-4")
        return self._project.start("flows.cli", "run", self._project.config, *given, log=name)

    def _inject(self, fault: Fault, name: str) -> None:
        at = len(self._project.metrics(name))
        if fault.fault == "Ctrl-C":
            injected = time.time()
            family = tree(self._running.pid)[1:]
            self._running.send_signal(signal.SIGINT)
            code = self._running.wait(_LIMIT_S)
            _, alive = psutil.wait_procs(family, timeout=30)
            fault.detect_s, fault.survivors = time.time() - injected, len(alive)
            assert code == _INTERRUPTED, f"{code}: {self._said(name)}"
            self._running = self._start(name)
            wait_for(lambda: len(self._project.metrics(name)) > at, "a step")
            fault.recover_s = time.time() - injected
        elif fault.fault == "PostgreSQL killed":
            (state,) = [one for one in start.states(self._services) if one.name == "postgres"]
            os.kill(int(state.description.split()[1].rstrip(",")), signal.SIGKILL)
        else:
            program, away_s = ("mlflow", _MLFLOW_AWAY_S) if "MLflow" in fault.fault else ("postgres", _POSTGRES_AWAY_S)
            self._control("stop", program)
            time.sleep(away_s)
            self._control("start", program)

    def _control(self, what: str, program: str) -> None:
        config = self._services.directory / CONFIG_FILE
        command = [sys.executable, "-m", "supervisor.supervisorctl", "-c", str(config), what, program]
        subprocess.run(command, check=True, capture_output=True)

    def _compare(self, fault: Fault, name: str) -> None:
        """Note what the record on the disk and MLflow have of a run."""
        lines, unbroken = self._project.metrics(name), self._project.metrics("unbroken")
        fault.losses_equal = [one["loss"] for one in lines] == [one["loss"] for one in unbroken]
        fault.data_lost = [one["step"] for one in lines] != list(range(1, STEPS + 1))
        runs = self._project.mlflow_runs(name)  # it also sees two of one step
        history = self._project.mlflow.get_metric_history(runs["train"].info.run_id, "train/loss")
        sent = [(point.step, point.value) for point in history]
        fault.data_lost |= sent != [(one["step"], one["loss"]) for one in lines]
        fault.data_lost |= {run.info.status for run in runs.values()} != {"FINISHED"}

    def _said(self, name: str) -> str:
        path = self._project.home / f"{name}.log"
        return path.read_text()[-4000:] if path.exists() else ""
