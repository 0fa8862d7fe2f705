"""Owns the train step: the launcher as a subprocess, its lines relayed, its metrics streamed to the tracker.

It knows the run directory and exit codes; the training is cherry's. A retry is the same launch on the same directory.
"""

from __future__ import annotations

import gc
import json
import math
import time
from contextlib import ExitStack
from pathlib import Path

from prefect import task
from prefect.cache_policies import NO_CACHE

from base import storage
from cherry.launcher import TRAIN_MODULE
from tasks.artifacts import ProgressArtifact
from tasks.plan_record import compared
from tasks.plots import plot_training
from tasks.process import in_background
from tasks.providers.fan_out import one_command
from tasks.provision import hold_hosts
from tasks.steps import RunContext, StepRecord, StepRun, perform, put_aside, sections, worth_retrying
from tasks.tracking.metrics_relay import PARENT_SERIES, SERIES, MetricsRelay, read_metrics, tracked_name

# Sections that change what is trained. How it is launched, sharded, saved and retried does not: a run goes on from its
# checkpoint on another number of ranks.
_IDENTITY = ["seed", "init_from", "model", "data", "train", "lora"]
# How often a line of a training step goes to Prefect's log too, which is a request to its server.
_SAY_EVERY_S = 10.0
# A compressed trace of a few steps is some megabytes; what is larger stays in the run directory.
_PROFILE_MAX_BYTES = 64 << 20


@task(name="train", cache_policy=NO_CACHE, retry_condition_fn=worth_retrying)
def train(context: RunContext, data: StepRecord) -> StepRecord:
    """Train to the last step, from the newest committed checkpoint if there is one."""
    inputs = {**sections(context.config, _IDENTITY), "data_fingerprint": data.fingerprint}

    def work(step: StepRun) -> dict[str, str]:
        _claim(context.path, step.fingerprint)
        folder = context.path / "train"
        relay = MetricsRelay(folder, step.tracker, step.run_id)
        parent = MetricsRelay(folder, step.tracker, context.parent_run_id, PARENT_SERIES)
        artifact = ProgressArtifact(f"train-{context.config.name}", "Training")
        said = -math.inf

        def on_line(line: str) -> None:
            nonlocal said
            fraction, now = _fraction(line), time.monotonic()
            if fraction is None or fraction == 1.0 or now - said >= _SAY_EVERY_S:
                step.say(line, fraction)
                said = said if fraction is None else now
            else:
                step.show(line, fraction)
            artifact.reached(fraction)

        with ExitStack() as beside:
            # Looking for garbage in what stays would take a core from training for longer than a step.
            gc.collect()
            gc.freeze()
            beside.callback(gc.unfreeze)
            with in_background():
                beside.enter_context(relay)
                beside.enter_context(parent)
            provider, hosts = hold_hosts(context)
            commands = provider.commands(hosts, _arguments(context, step.fingerprint))
            command = one_command(hosts, commands, folder)
            step.run_command(command, name="cherry-launch", on_line=on_line, log_file=folder / "launcher.log")
        return _conclude(context, step, folder)

    return perform(context, "train", inputs, work)


def _arguments(context: RunContext, identity: str) -> list[str]:
    """The training program and its arguments, behind the launcher's flags."""
    directory = context.config.checkpoint.directory
    config_file = str(context.path / "config.yaml")
    arguments = ["-m", TRAIN_MODULE, "--config", config_file, "--run_dir", context.directory]
    if directory is not None:
        # The directory may be shared: this run and this config have their own place in it.
        own = storage.join(directory, f"{context.config.name}-{identity[:8]}")
        arguments += ["--set", f"checkpoint.directory={json.dumps(own)}"]
    return arguments


def _conclude(context: RunContext, step: StepRun, folder: Path) -> dict[str, str]:
    result = storage.read_json(str(folder / "result.json"))
    figures = {key: value for key, value in result.items() if isinstance(value, int | float)}
    # Not under the name of a series, whose last point they would not be.
    step.metrics(**{("final_" if key in SERIES else "") + tracked_name(key): value for key, value in figures.items()})
    beside = compared(context.path, figures)
    step.metrics(**beside)
    step.tracker.log(
        context.parent_run_id,
        metrics={key: figures[key] for key in ("loss_first", "loss_last", "tokens_per_second")} | beside,
    )
    lines, first = list(read_metrics(folder / "metrics.jsonl")), context.config.model.first_k_dense_replace
    for path in plot_training(lines, folder / "plots", first_moe_layer=first):
        for run_id in (step.run_id, context.parent_run_id):
            step.tracker.artifact(run_id, path, "plots")
    for path in _profiles(folder / "profile"):
        step.tracker.artifact(step.run_id, path, "profile")
    return {"result": str(folder / "result.json"), "checkpoint": result["checkpoint"]}


def _profiles(folder: Path) -> list[Path]:
    """Files of `train.profile` that are small enough for the tracking server, sorted by name."""
    found = sorted(folder.iterdir()) if folder.exists() else []
    return [path for path in found if path.stat().st_size <= _PROFILE_MAX_BYTES]


def _claim(run_directory: Path, identity: str) -> None:
    """Take `train/` for this fingerprint; one that another config made is put aside, so it is never resumed."""
    folder = run_directory / "train"
    owner = folder / "fingerprint"
    if owner.exists() and owner.read_text() != identity:
        put_aside(folder, owner.read_text())
    storage.write_bytes(str(owner), identity.encode())


def _fraction(line: str) -> float | None:
    """How far a `step 120/300 ...` line says that training is."""
    words = line.split(" ", 2)
    if len(words) < 3 or words[0] != "step" or "/" not in words[1]:
        return None
    done, total = words[1].split("/")
    return int(done) / int(total)
