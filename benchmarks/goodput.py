"""Measures the goodput of a job over ssh that meets a fault every few minutes, beside what its plan foretells.

    python -m benchmarks.goodput [--minutes 30] [--every 180] [--seed N] [--output FILE]

A first job measures what the plan needs: the time of a step and of a save while nothing happens, then one fault of each
kind, for detection and restart. These go into a cluster file, as a user would write them, and the plan is made of that.
A second job is then watched from its start on, with a fault in the middle of each period. Goodput is the share of the
wall-clock time in steps that are in the record at the end: of steps that were repeated, the last time counts. Needs
root, for namespaces. It fails when goodput is 85 % or less, or more than 5 points from the plan's.

The plan takes faults to come at random, and these come one in a period: with a loss of 20 s each that makes half a
point at 180 s, and five at 60 s.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shlex
import signal
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import yaml

from base.config import load
from benchmarks.chaos.record import Fault
from benchmarks.chaos.ssh_faults import KINDS as SSH_KINDS
from benchmarks.chaos.ssh_faults import SshCampaign, hosts_of
from cherry.cluster import read_cluster
from cherry.job_config import JobConfig
from cherry.planner.goodput import DAY_S
from cherry.planner.plan import RunPlan, checkpoint_bytes, run_plan
from cherry.planner.step_time import StepTime
from cherry.planner.workload import workload_of
from tests import hosts
from tests.hosts import LabHosts
from tests.supervised import until
from tests.training_job import Job, prepare_documents, write_config
from tests.watcher import watch_this_process

LEAST_GOODPUT, MOST_DIFFERENCE = 0.85, 0.05
NODES = 2  # and a spare
EVERY_STEPS = 20
# 0.2 to 0.4 s a step on 2 cores, as other programs leave them.
SETTINGS = {
    "train.batch_size": 240,
    "train.gradient_accumulation_steps": 5,
    "train.schedule": "constant",
    # So small a job learns its documents by heart; a rollback would be a fault that nobody injected.
    "train.learning_rate": 5e-4,
    "train.spike_sigma": "null",
    "checkpoint.every_steps": EVERY_STEPS,
}
FLAGS = tuple(part for key, value in SETTINGS.items() for part in ("--set", f"{key}={value}"))
UNBROKEN_SAVES = 10
# Nothing but the harness starts a supervisor again.
KINDS = tuple(kind for kind in SSH_KINDS if kind != "supervisor killed")


@dataclass(frozen=True)
class Costs:
    """What a job's steps, saves and faults cost; seconds."""

    step_s: float
    """Mean step while nothing happens."""
    stall_s: float
    """Time between steps, for each save."""
    write_s: float
    """From the step until its save is committed, median."""
    detection_s: float
    """From a fault to the end of the attempt, mean over one of each kind."""
    restart_s: float
    """From the end of an attempt to the first new step, mean over one of each kind."""

    def cluster_keys(self, every_s: float, held: int) -> dict[str, float]:
        """The keys of a cluster file that say this, with a fault every so many seconds.

        Args:
            held: bytes of a checkpoint.
        """
        return {
            "interruptions_per_gpu_day": DAY_S / every_s / NODES,
            "detection_s": round(self.detection_s, 2),
            "restart_s": round(self.restart_s, 2),
            "storage_write_bytes_s": round(held / self.write_s),
        }


@dataclass(frozen=True)
class Measured:
    """A watched job, from its start."""

    wall_s: float
    in_steps_s: float
    """Time in steps that are in the record at the end."""
    start_s: float
    """Until its first step began."""
    steps: int
    faults: list[Fault]

    @property
    def goodput(self) -> float:
        return self.in_steps_s / self.wall_s

    def shares(self, step_s: float) -> dict[str, float]:
        """Where the wall-clock time went, as fractions of it; what no other line has is the last one's."""
        found = {
            "steps that counted": self.in_steps_s,
            "start": self.start_s,
            "from a fault to the first new step": sum((one.recover_s or 0.0) - step_s for one in self.faults),
            "steps that were repeated": step_s * sum(one.steps_repeated or 0 for one in self.faults),
        }
        found["saves, and what else is between steps"] = self.wall_s - sum(found.values())
        return {name: seconds / self.wall_s for name, seconds in found.items()}


class Bench:
    """Jobs on the same hosts, one after the other."""

    def __init__(self, folder: Path, lab: LabHosts, choose: random.Random) -> None:
        self._folder, self._lab, self._choose = folder, lab, choose
        self._prepared = prepare_documents(folder)
        self._config = write_config(folder / "mini.yaml", self._prepared)

    def costs(self) -> Costs:
        """Measure a job while nothing happens, then through one fault of each kind."""
        campaign, job = self._campaign("measured-before")
        try:
            campaign.start()
            step_s, stall_s, write_s = _unbroken(job)
            print(f"  nothing happens: step {step_s:.3f} s, stall {stall_s:.3f} s, write {write_s:.3f} s", flush=True)
            campaign.meet_all(self._choose.sample(KINDS, len(KINDS)))
            campaign.end()
        finally:
            campaign.close()
        detected = statistics.mean(one.detect_s or 0.0 for one in campaign.faults)
        recovered = statistics.mean(one.recover_s or 0.0 for one in campaign.faults) - step_s
        return Costs(step_s, stall_s, write_s, detected, recovered - detected)

    def watch(self, minutes: float, every_s: float) -> Measured:
        """A job through a fault in the middle half of each period."""
        campaign, job = self._campaign("watched")
        kinds, began = self._kinds(int(60 * minutes // every_s)), time.time()
        try:
            campaign.start()
            for number, kind in enumerate(kinds):
                _sleep_until(began + every_s * (number + self._choose.uniform(0.25, 0.75)))
                campaign.wait_until_training()
                campaign.meet(kind)
            _sleep_until(began + 60 * minutes)
            ended, lines = time.time(), job.metrics
            campaign.end()
        finally:
            campaign.close()
        assert [line["step"] for line in lines] == list(range(1, len(lines) + 1)), "steps are missing, or twice"
        in_steps_s = sum(line["step_seconds"] for line in lines)
        start_s = lines[0]["time"] - lines[0]["step_seconds"] - began
        return Measured(ended - began, in_steps_s, start_s, len(lines), campaign.faults)

    def plan(self, costs: Costs, every_s: float) -> tuple[RunPlan, dict[str, float]]:
        """The plan by these costs, and the keys of the cluster file that it was made of."""
        overrides = [f"{key}={value}" for key, value in SETTINGS.items()]
        config = load(self._config, JobConfig, [*overrides, f"launch.nnodes={NODES}", "train.steps=1000000"])
        keys = costs.cluster_keys(every_s, checkpoint_bytes(config))
        path = self._folder / "planned.yaml"
        path.write_text(yaml.safe_dump({"nodes": [{"host": name} for name in self._lab.names[:NODES]], **keys}))
        cluster = read_cluster(str(path))
        work = workload_of(config, cluster)
        return run_plan(config, cluster, work, StepTime(work, {"measured": costs.step_s}, {}, {})), keys

    def _campaign(self, name: str) -> tuple[SshCampaign, Job]:
        job = Job(self._folder / name, self._config, self._prepared)
        return SshCampaign(job, self._lab, NODES, self._choose, FLAGS), job

    def _kinds(self, count: int) -> list[str]:
        """So many, of which each is there once before any is there twice."""
        found: list[str] = []
        while len(found) < count:
            found += self._choose.sample(KINDS, len(KINDS))
        return found[:count]


def _unbroken(job: Job) -> tuple[float, float, float]:
    """(mean step, stall of a save, time until its commit) in seconds, from the first save on."""
    committed = {}
    saves = range(EVERY_STEPS, EVERY_STEPS * (UNBROKEN_SAVES + 2), EVERY_STEPS)
    for step in saves:  # as they come, since old ones are removed
        marker = job.checkpoint(step) / "COMMITTED"
        until(marker.exists, f"the checkpoint of step {step}")
        committed[step] = marker.stat().st_mtime
    lines = job.metrics
    first, last = lines[saves[0] - 1], lines[saves[-1] - 1]
    between = [line["step_seconds"] for line in lines[saves[0] : saves[-1]]]
    stall_s = (last["time"] - first["time"] - sum(between)) / UNBROKEN_SAVES
    writes = [committed[step] - lines[step - 1]["time"] for step in saves]
    return statistics.mean(between), max(0.0, stall_s), max(0.001, statistics.median(writes))


def _sleep_until(moment: float) -> None:
    time.sleep(max(0.0, moment - time.time()))


def report(measured: Measured, plan: RunPlan, costs: Costs, keys: dict[str, float]) -> None:
    """Print the comparison, and what it rests on."""
    print("planned with these keys of the cluster file, all measured but the first, which is set:")
    for name, value in keys.items():
        print(f"  {name}: {value:.6g}")
    print(f"and with a step of {costs.step_s:.3f} s (measured), saved every {EVERY_STEPS} steps")
    print(f"stall of a save: {costs.stall_s:.3f} s measured, {plan.stall_s:.3f} s planned")
    print(f"{len(measured.faults)} faults in {measured.wall_s / 60:.1f} min, {measured.steps:,} steps:")
    for name, share in measured.shares(costs.step_s).items():
        print(f"  {100 * share:5.1f} %  {name}")
    print(f"goodput: {100 * measured.goodput:.1f} % measured, {100 * plan.goodput:.1f} % planned", end="; ")
    print(f"best at a save every {plan.best_every_steps} steps ({100 * plan.best_goodput:.1f} %)")


def row(measured: Measured, plan: RunPlan, costs: Costs, keys: dict[str, float], every_s: float) -> dict[str, Any]:
    """The row of one run."""
    faults = [
        {key: value if not isinstance(value, float) else round(value, 2) for key, value in asdict(one).items()}
        for one in measured.faults
    ]
    kept = ("fault", "detect_s", "recover_s", "steps_repeated", "survivors", "data_lost")
    return {
        "benchmark": "goodput",
        "date": date.today().isoformat(),
        "command": shlex.join(["python", "-m", "benchmarks.goodput", *sys.argv[1:]]),
        "cores": len(os.sched_getaffinity(0)),
        "nodes": NODES,
        "settings": SETTINGS,
        "wall_s": round(measured.wall_s, 1),
        "fault_every_s": every_s,
        "goodput": round(measured.goodput, 4),
        "planned_goodput": round(plan.goodput, 4),
        "planned_best_every_steps": plan.best_every_steps,
        "shares": {name: round(share, 4) for name, share in measured.shares(costs.step_s).items()},
        "measured_before": {key: round(value, 4) for key, value in asdict(costs).items()},
        "cluster": keys,
        "faults": [{key: one[key] for key in kept} for one in faults],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0, help="of the watched job (default: 30)")
    parser.add_argument("--every", type=float, default=180.0, help="seconds for each fault (default: 180)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, metavar="FILE", help="where to write the row, as JSON")
    options = parser.parse_args()
    if (reason := hosts.missing()) is not None:
        print(f"no hosts: {reason}", file=sys.stderr)
        return 1
    watch_this_process()
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    with tempfile.TemporaryDirectory(prefix="cherry-goodput-") as name, hosts_of(NODES + 1) as lab:
        bench = Bench(Path(name), lab, random.Random(options.seed))
        print("before: a job while nothing happens, then one fault of each kind", flush=True)
        costs = bench.costs()
        plan, keys = bench.plan(costs, options.every)
        print(f"watched: a job for {options.minutes:g} min, with a fault every {options.every:g} s", flush=True)
        measured = bench.watch(options.minutes, options.every)
    report(measured, plan, costs, keys)
    if options.output is not None:
        found = row(measured, plan, costs, keys, options.every)
        options.output.write_text("[\n" + json.dumps(found) + "\n]\n")
    near = abs(measured.goodput - plan.goodput) <= MOST_DIFFERENCE
    return 0 if measured.goodput > LEAST_GOODPUT and near else 1


if __name__ == "__main__":
    raise SystemExit(main())
