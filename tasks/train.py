"""The train step: the launcher as a subprocess, its progress shown, its metrics relayed to the tracker.

A retry is the same launch on the same run directory: it resumes from the newest committed checkpoint.
"""

from __future__ import annotations

import gc
import json
import math
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from prefect import task
from prefect.cache_policies import NO_CACHE

from base import storage
from cherry.data.shards import read_manifest
from cherry.launcher import TRAIN_MODULE
from cherry.train_record import FLOW_SERIES, SERIES
from tasks.artifacts import ProgressArtifact
from tasks.plan_record import compared
from tasks.plots import plot_training
from tasks.processes.process import in_background
from tasks.providers.fan_out import one_command
from tasks.provision import hold_hosts
from tasks.run_logger import run_logger
from tasks.steps import (
    RunContext,
    StepRecord,
    StepRun,
    find_finished,
    move_aside,
    perform,
    sections,
    worth_retrying,
)
from tasks.tracking.metrics_relay import METRICS_FILE, MetricsRelay, read_metrics

# Sections that change what is trained. How it is launched, sharded, saved and retried does not: a run resumes from its
# checkpoint on another number of ranks.
_IDENTITY = ["seed", "init_from", "model", "data", "train", "lora"]
# How often a line of a training step goes to Prefect's log too, which is a request to its server.
_LOG_EVERY_S = 10.0
# A compressed trace of a few steps is some megabytes; what is larger stays in the run directory.
_PROFILE_MAX_BYTES = 64 << 20
_CLAIM_FILE = "fingerprint"
# The evaluate step has figures of the same names, over whole documents; the trainer's are over windows of them.
_RESULT_NAMES = {"heldout_bits_per_byte": "heldout_window_bits_per_byte"}


@task(name="train", cache_policy=NO_CACHE, retry_condition_fn=worth_retrying)
def train(context: RunContext, data: StepRecord) -> StepRecord:
    """Train to the last step, from the newest committed checkpoint if there is one."""
    inputs = {**sections(context.config, _IDENTITY), "data": _data_identity(data.outputs["data"])}

    def work(step: StepRun) -> dict[str, str]:
        claimed = claim(context, step)
        folder = context.path / "train"
        relay = MetricsRelay(folder, step.tracker, step.run_id)
        flow_relay = MetricsRelay(folder, step.tracker, context.parent_run_id, FLOW_SERIES)
        on_progress = _progress(step, ProgressArtifact(f"train-{context.config.name}", "Training"))
        with ExitStack() as beside:
            # Collecting garbage among the objects that stay would take a core from training for longer than a step.
            gc.collect()
            gc.freeze()
            beside.callback(gc.unfreeze)
            with in_background():
                beside.enter_context(relay)
                beside.enter_context(flow_relay)
            provider, hosts = hold_hosts(context)
            commands = provider.commands(hosts, _arguments(context, claimed))
            command = one_command(hosts, commands, folder)
            step.run_command(command, name="cherry-launch", on_progress=on_progress, log_file=folder / "launcher.log")
        return _conclude(context, step, folder)

    return perform(context, "train", inputs, work)


def _data_identity(directory: str) -> dict[str, object]:
    """Identity of the prepared data, whatever code prepared it: its documents, their tokens and the tokenizer."""
    manifest = read_manifest(directory)
    tokenizer = storage.digest(storage.join(directory, "tokenizer.json"))
    return {
        "digest": manifest.digest,
        "tokens": manifest.tokens,
        "sequences": manifest.sequences,
        "tokenizer": tokenizer,
    }


def _progress(step: StepRun, artifact: ProgressArtifact) -> Callable[[str, float], None]:
    """Callback that shows each progress line on the terminal, and one in so many seconds in the run's log."""
    logged_at = -math.inf

    def on_progress(line: str, fraction: float) -> None:
        nonlocal logged_at
        now = time.monotonic()
        if fraction == 1.0 or now - logged_at >= _LOG_EVERY_S:
            step.say(line, fraction)
            logged_at = now
        else:
            step.show(line, fraction)
        artifact.reached(fraction)

    return on_progress


def _arguments(context: RunContext, claimed: str) -> list[str]:
    """The training program and its arguments, after the launcher's flags."""
    directory = context.config.checkpoint.directory
    config_file = str(context.path / "config.yaml")
    arguments = ["-m", TRAIN_MODULE, "--config", config_file, "--run_dir", context.directory]
    if directory is not None:
        # The directory may be shared: this run and this config have their own place in it.
        own = storage.join(directory, f"{context.config.name}-{claimed[:8]}")
        arguments += ["--set", f"checkpoint.directory={json.dumps(own)}"]
    return arguments


def _conclude(context: RunContext, step: StepRun, folder: Path) -> dict[str, str]:
    result = storage.read_json(str(folder / "result.json"))
    figures = {key: value for key, value in result.items() if isinstance(value, int | float)}
    step.metrics(**{_result_name(key): value for key, value in figures.items()})
    beside = compared(context.path, figures)
    step.metrics(**beside)
    step.tracker.log(
        context.parent_run_id,
        metrics={key: figures[key] for key in ("loss_first", "loss_last", "tokens_per_second")} | beside,
    )
    records, first = read_metrics(folder / METRICS_FILE), context.config.model.first_k_dense_replace
    for path in plot_training(records, folder / "plots", first_moe_layer=first):
        for run_id in (step.run_id, context.parent_run_id):
            step.tracker.artifact(run_id, path, "plots")
    for path in _profiles(folder / "profile"):
        step.tracker.artifact(step.run_id, path, "profile")
    return {"result": str(folder / "result.json"), "checkpoint": result["checkpoint"]}


def _profiles(folder: Path) -> list[Path]:
    """Files of `train.profile` that are small enough for the tracking server, sorted by name."""
    found = sorted(folder.iterdir()) if folder.exists() else []
    return [path for path in found if path.stat().st_size <= _PROFILE_MAX_BYTES]


def _result_name(key: str) -> str:
    """Name in the tracker of a figure of result.json, which differs from that of the series."""
    return f"final_{SERIES[key]}" if key in SERIES else _RESULT_NAMES.get(key, key)


def claim(context: RunContext, step: StepRun) -> str:
    """Fingerprint of the first attempt of the training in `train/`, after claiming the directory for these inputs.

    Training of other inputs, and finished training of other code, is moved aside, so it is never resumed. Unfinished
    training resumes with changed code: a fix does not cost the steps before it.
    """
    folder = context.path / "train"
    owner = folder / _CLAIM_FILE
    if owner.exists():
        inputs, _, began_as = owner.read_text().partition("\n")
        began_as = began_as or inputs  # written by a version that had one line
        done = find_finished(context.path, "train")
        finished = done is not None and done.inputs_fingerprint == step.inputs_fingerprint
        if inputs == step.inputs_fingerprint and not finished:
            if began_as != step.fingerprint:
                run_logger().info("training resumes with other code than it began with")
            return began_as
        move_aside(folder, began_as)
    storage.write_bytes(str(owner), f"{step.inputs_fingerprint}\n{step.fingerprint}".encode())
    return step.fingerprint
