"""Faults of runs that a Prefect worker started: of its processes and its servers, and runs that are cancelled."""

from __future__ import annotations

import random
import subprocess
import time

import psutil

from benchmarks.chaos.record import Fault
from tests.processes import every, is_alive, kill_all
from tests.project import Project, kill, wait_for

STEPS = 300
KILLED = {
    "flow killed": ("flow",),
    "worker killed": ("worker",),
    "Prefect server killed": ("server",),
    "flow killed after the server's restart": ("server", "flow"),
    "worker, flow, launcher and ranks killed": ("worker", "flow", "programs"),
}
CANCELLED = ("cancelled", "cancelled after the server's restart")
KINDS = (*KILLED, *CANCELLED)


class FlowCampaign:
    """Runs of one project, each with one fault while it trains. Make it in a project whose server has no worker."""

    def __init__(self, project: Project, choose: random.Random) -> None:
        self._project, self._choose = project, choose
        self._worker = self._start_worker()
        assert self._project.end_of(self._start("unbroken")) == "COMPLETED"
        self.faults: list[Fault] = []

    def run(self, kinds: list[str]) -> None:
        """Meet faults of these kinds, each in a run of its own."""
        for number, kind in enumerate(kinds):
            fault = Fault(kind, "prefect")
            (self._cancel if kind in CANCELLED else self._kill)(fault, f"run-{number}")
            self.faults.append(fault)
            print(f"  {len(self.faults):3d} {fault}", flush=True)

    def close(self) -> None:
        kill(self._worker)

    def _start_worker(self) -> subprocess.Popen[bytes]:
        return self._project.start("prefect", "worker", "start", "--pool", "cherry", log="worker")

    def _start(self, name: str, steps: int = STEPS) -> str:
        values = {
            "train": {"steps": steps, "schedule": "constant", "learning_rate": 5e-4},
            "checkpoint": {"every_steps": 20},
        }
        return self._project.run_deployment("train-flow/train-tiny", overrides={"name": name, **values})

    def _started(self, name: str, steps: int = STEPS) -> str:
        """A run that has trained for a while."""
        run, at = self._start(name, steps), self._choose.randrange(20, STEPS // 3)
        wait_for(lambda: len(self._project.metrics(name)) > at, "training")
        return run

    def _kill(self, fault: Fault, name: str) -> None:
        run = self._started(name)
        at, injected = len(self._project.metrics(name)), time.time()
        ranks = self._programs(name)
        for what in KILLED[fault.fault]:
            self._kill_one(what, name)
        if "flow" in KILLED[fault.fault]:
            psutil.wait_procs(ranks, timeout=30)
            fault.survivors = sum(map(is_alive, ranks))
            wait_for(lambda: self._project.state(run) != "RUNNING", "the crash", deadline_s=400)
            fault.detect_s = time.time() - injected
            wait_for(lambda: self._programs(name) and len(self._project.metrics(name)) > at, "training", deadline_s=400)
            fault.recover_s = time.time() - injected
        fault.completed = self._end(run) == "COMPLETED"
        lines = self._project.metrics(name)
        fault.losses_equal = [one["loss"] for one in lines] == [
            one["loss"] for one in self._project.metrics("unbroken")
        ]
        fault.data_lost = [one["step"] for one in lines] != list(range(1, STEPS + 1))
        fault.data_lost |= "train" not in self._project.mlflow_runs(name)  # which also sees two of one step
        wait_for(lambda: not self._project.processes(name), "the end of every process")

    def _kill_one(self, what: str, name: str) -> None:
        if what == "worker":
            self._worker.kill()
            self._worker.wait()
            self._worker = self._start_worker()
        elif what == "server":
            self._project.restart_server()
        elif what == "flow":
            self._project.flow_process(name).kill()
        else:
            kill_all(self._programs(name))

    def _cancel(self, fault: Fault, name: str) -> None:
        """Cancelled is its good end: every process is gone, and it does not start again."""
        run = self._started(name, steps=1_000_000)
        if fault.fault != "cancelled":
            self._project.restart_server()
        programs, injected = self._programs(name), time.time()
        asked = self._project.call("prefect", "flow-run", "cancel", run)
        assert asked.returncode == 0, asked.stderr
        _, alive = psutil.wait_procs(programs, timeout=30)
        fault.survivors, fault.detect_s = len(alive), time.time() - injected
        fault.completed = self._end(run) == "CANCELLED"

    def _end(self, run: str) -> str:
        """State of a flow run whose states may pass through Crashed on their way."""
        ends = ("COMPLETED", "FAILED", "CANCELLED")
        return str(wait_for(lambda: (state := self._project.state(run)) in ends and state, "its end", deadline_s=400))

    def _programs(self, name: str) -> list[psutil.Process]:
        """The launcher and the ranks of a run."""
        place = str(self._project.runs / name)
        found = []
        for one in every("cmdline", "status"):
            if one.info["status"] != psutil.STATUS_ZOMBIE and any(place in word for word in one.info["cmdline"] or []):
                found.append(one)
        return found
