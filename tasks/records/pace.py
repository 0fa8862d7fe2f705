"""Training's measured step time beside its plan's: a warning, once a run, when a step takes three times as long."""

from __future__ import annotations

import os
from collections import deque
from pathlib import Path
from statistics import median

from base import storage
from base.json_lines import from_the_end
from cherry.cluster import LOCAL, read_cluster
from cherry.planner.local_device import local_gpus
from tasks.run_config import RunConfig

_SLOW = 3.0
# The first steps allocate memory and compile; the median of so many after them is no outlier.
_WARM_UP_STEPS = 5
_STEPS = 10
_WARNED_FILE = "slow.json"


class Pace:
    """Step times of the training in `folder`, from the moment that this was made, against the run's plan.

    Args:
        planned_s: predicted time of a step; `None` without a plan.
    """

    def __init__(self, config: RunConfig, folder: Path, planned_s: float | None) -> None:
        self._config = config
        self._warned = folder / _WARNED_FILE
        self._reader = from_the_end(folder / "metrics.jsonl")
        self._left_out = 0
        self._seconds: deque[float] = deque(maxlen=_STEPS)
        self._planned = None if self._warned.exists() else planned_s

    def warning(self) -> str | None:
        """What a person should know of the newest steps' time; `None` without a plan, and after the first warning."""
        if self._planned is None:
            return None
        for record in self._reader.read_new() or []:
            seconds = record.get("step_seconds")
            if isinstance(seconds, float) and self._left_out >= _WARM_UP_STEPS:
                self._seconds.append(seconds)
            self._left_out += 1
        if len(self._seconds) < _STEPS:
            return None
        measured, planned = median(self._seconds), self._planned
        if measured <= _SLOW * planned:
            return None
        self._planned = None
        storage.write_json(str(self._warned), {"step_seconds": measured, "predicted_step_seconds": planned})
        return (
            f"a step takes {measured:.3g} s, {measured / planned:.1f} times the plan's {planned:.3g} s. "
            f"Likely causes: {_causes(self._config)}."
        )


def _causes(config: RunConfig) -> str:
    if read_cluster(config.cluster).kind != LOCAL:
        return "other programs on a host, a slow link between hosts, or data that is read slower than it is used"
    if local_gpus():
        return "other programs on the GPUs (nvidia-smi), or data that is read slower than it is used"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    others = f"other programs on the CPU (its load is {os.getloadavg()[0]:.1f} on {cores} cores; see top)"
    threads = config.train.threads_per_rank or os.environ.get("OMP_NUM_THREADS") or "as many as cores"
    if str(threads) == "1":
        return others
    return f"{others}, or threads that wait for each other (a rank has {threads}): try train.threads_per_rank=1"
