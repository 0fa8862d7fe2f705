"""Owns the train step: the launcher as a subprocess, its lines relayed, its metrics streamed to the tracker.

It knows the run directory and exit codes; the training is cherry's. A retry is the same launch on the same directory.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prefect import task
from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.cache_policies import NO_CACHE

from base import storage
from tasks.plots import plot_training
from tasks.process import PROJECT_ROOT, run_module
from tasks.steps import RunContext, StepRecord, StepRun, perform, sections, worth_retrying
from tasks.tracking import Tracker

# Sections that change what is trained. How it is launched, saved and retried does not.
_IDENTITY = ["seed", "init_from", "model", "data", "parallel", "train", "launch"]
_SERIES = (
    "loss",
    "mtp_loss",
    "balance_loss",
    "grad_norm",
    "learning_rate",
    "tokens_per_second",
    "mfu",
    "expert_load_max_over_mean",
    "heldout_loss",
    "step_seconds",
)
_POLL_S = 1.0


@task(name="train", cache_policy=NO_CACHE, retry_condition_fn=worth_retrying)
def train(context: RunContext, data: StepRecord) -> StepRecord:
    """Train to the last step, from the newest committed checkpoint if there is one."""
    inputs = {**sections(context.config, _IDENTITY), "data_fingerprint": data.fingerprint}

    def work(step: StepRun) -> dict[str, str]:
        _claim(context.path, step.fingerprint)
        folder = context.path / "train"
        artifact = create_progress_artifact(0.0, key=f"train-{context.config.name}", description="Training")

        def on_line(line: str) -> None:
            fraction = _fraction(line)
            step.say(line, fraction)
            if fraction is not None and round(100 * fraction) % 5 == 0:
                update_progress_artifact(artifact_id=artifact, progress=100 * fraction)  # type: ignore[arg-type]

        arguments = [
            f"--nproc_per_node={context.config.launch.nproc_per_node}",
            f"--nnodes={context.config.launch.nnodes}",
        ]
        if context.config.launch.master_port is not None:
            arguments.append(f"--master_port={context.config.launch.master_port}")
        program = str(PROJECT_ROOT / "train.py")
        arguments += [program, "--config", str(context.path / "config.yaml"), "--run_dir", context.directory]
        with MetricsRelay(folder, step.tracker, step.run_id):
            stop = _system_metrics(context, step)
            try:
                run_module(
                    "cherry.launcher",
                    arguments,
                    on_line=on_line,
                    log_file=folder / "launcher.log",
                    record_file=context.path / "program.json",
                )
            finally:
                stop()
        return _conclude(context, step, folder)

    return perform(context, "train", inputs, work)


def _system_metrics(context: RunContext, step: StepRun) -> Any:
    stop = context.tracker().system_metrics(step.run_id) if context.config.tracking.system_metrics else None
    return stop or (lambda: None)


def _conclude(context: RunContext, step: StepRun, folder: Path) -> dict[str, str]:
    result = storage.read_json(str(folder / "result.json"))
    figures = {key: value for key, value in result.items() if isinstance(value, int | float)}
    step.metrics(**{f"final_{key}" if key in ("loss_last", "heldout_loss") else key: v for key, v in figures.items()})
    step.tracker.log(
        context.parent_run_id,
        metrics={key: figures[key] for key in ("loss_first", "loss_last", "heldout_loss", "tokens_per_second")},
    )
    for path in plot_training(list(read_metrics(folder / "metrics.jsonl")), folder / "plots"):
        for run_id in (step.run_id, context.parent_run_id):
            step.tracker.artifact(run_id, path, "plots")
    return {"result": str(folder / "result.json"), "checkpoint": result["checkpoint"]}


def _claim(run_directory: Path, identity: str) -> None:
    """Take `train/` for this fingerprint; one that another config made is moved aside, never resumed or deleted."""
    folder = run_directory / "train"
    owner = folder / "fingerprint"
    if folder.exists() and owner.exists() and owner.read_text() != identity:
        target = run_directory / f"train.{owner.read_text()[:8]}"
        number = 1
        while target.exists():
            number += 1
            target = run_directory / f"train.{owner.read_text()[:8]}.{number}"
        folder.rename(target)
    folder.mkdir(parents=True, exist_ok=True)
    storage.write_bytes(str(owner), identity.encode())


def _fraction(line: str) -> float | None:
    """How far a `step 120/300 ...` line says that training is."""
    words = line.split(" ", 2)
    if len(words) < 3 or words[0] != "step" or "/" not in words[1]:
        return None
    done, total = words[1].split("/")
    return int(done) / int(total)


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """The whole lines of a metrics stream; one that is still being written is left out."""
    if not path.exists():
        return
    for line in path.read_text().split("\n")[:-1]:
        yield json.loads(line)


class MetricsRelay:
    """Sends new lines of metrics.jsonl to the tracker from a thread, so that an outage or a slow server costs nothing.

    The last step that was sent is kept beside the stream: a retry does not send a step twice.
    """

    def __init__(self, folder: Path, tracker: Tracker, run_id: str | None) -> None:
        self._metrics = folder / "metrics.jsonl"
        self._mark = folder / "tracked_step"
        self._tracker = tracker
        self._run_id = run_id
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="metrics-relay", daemon=True)

    def __enter__(self) -> MetricsRelay:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _follow(self) -> None:
        while not self._stop.wait(_POLL_S):
            self.send_new()
        self.send_new()

    def send_new(self) -> None:
        """Send the steps that were not sent yet; those that cannot be sent are tried again at the next call."""
        sent = int(self._mark.read_text()) if self._mark.exists() else 0
        lines = [line for line in read_metrics(self._metrics) if line["step"] > sent]
        points = [
            (key, float(line[key]), int(line["step"]), int(line["time"] * 1000))
            for line in lines
            for key in _SERIES
            if key in line
        ]
        if points and self._tracker.points(self._run_id, points):
            self._mark.write_text(str(lines[-1]["step"]))
