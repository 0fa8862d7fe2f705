"""The train step: the launcher as a subprocess, its progress shown, its metrics relayed to the tracker.

A retry is the same launch on the same run directory: it resumes from the newest committed checkpoint.
"""

from __future__ import annotations

import gc
import json
import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from pathlib import Path

from prefect import task
from prefect.cache_policies import NO_CACHE

from base import storage
from base.errors import OperationalError
from base.json_lines import from_the_end
from cherry.cluster import LOCAL, read_cluster
from cherry.data.shards import read_manifest
from cherry.launcher import TRAIN_MODULE
from cherry.train_record import FLOW_SERIES, METRICS_FILE, SERIES
from cherry.watch.stragglers import STRAGGLERS_FILE, read_comparisons
from tasks.artifacts import ProgressArtifact
from tasks.plan_record import compared, planned_step_seconds
from tasks.plots import plot_training
from tasks.processes.hang_watch import HangWatch
from tasks.processes.process import in_background
from tasks.providers.fan_out import one_command
from tasks.providers.protocol import Hosts, read_reservation
from tasks.provision import hold_hosts, refuse_overdue
from tasks.records.figures import tracked
from tasks.records.pace import Pace
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
from tasks.tracking.metrics_relay import MetricsRelay, read_metrics
from tasks.tracking.watch_relay import WatchRelay

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


@task(name="train", task_run_name="train", cache_policy=NO_CACHE, retry_condition_fn=worth_retrying)
def train(context: RunContext, data: StepRecord) -> StepRecord:
    """Train to the last step, from the newest committed checkpoint if there is one."""
    inputs = {**sections(context.config, _IDENTITY), "data": _data_identity(data.outputs["data"])}

    def work(step: StepRun) -> dict[str, str]:
        claimed = claim(context, step)
        folder = context.path / "train"
        relay = MetricsRelay(folder, step.tracker, step.run_id)
        flow_relay = MetricsRelay(folder, step.tracker, context.parent_run_id, FLOW_SERIES)
        nodes = context.config.tracking.system_metrics
        watch_relay = WatchRelay(folder, step.tracker, step.run_id, nodes=nodes)
        artifact = ProgressArtifact(f"train-{context.config.name}", "Training")
        on_progress = _progress(step, artifact, Pace(context.config, folder, planned_step_seconds(context.path)))
        with ExitStack() as beside:
            # Collecting garbage among the objects that stay would take a core from training for longer than a step.
            gc.collect()
            gc.freeze()
            beside.callback(gc.unfreeze)
            with in_background():
                beside.enter_context(relay)
                beside.enter_context(flow_relay)
                beside.enter_context(watch_relay)
            _launch(context, step, _arguments(context, claimed), on_progress)
        return _conclude(context, step, folder)

    return perform(context, "train", inputs, work)


def _launch(
    context: RunContext, step: StepRun, arguments: Sequence[str], on_progress: Callable[[str, float], None]
) -> None:
    """Run the launchers on the run's hosts to their end, or to that of the time for which the hosts are held."""
    provider, hosts = hold_hosts(context)
    folder = context.path / "train"
    reservation = read_reservation(context.path)
    try:
        step.run_command(
            one_command(hosts, provider.commands(hosts, arguments), folder),
            name="cherry-launch",
            on_line=_lines(step, folder),
            on_progress=on_progress,
            beside=_hang_watch(step, folder, hosts),
            until=None if reservation is None else reservation.until,
        )
    except OperationalError:
        if reservation is not None:
            refuse_overdue(reservation)  # then that ended it
        raise


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


def _progress(step: StepRun, artifact: ProgressArtifact, pace: Pace) -> Callable[[str, float], None]:
    """Callback that shows each progress line on the terminal, and one in so many seconds in the run's log.

    It also warns when steps are far slower than planned.
    """
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
        if (slow := pace.warning()) is not None:
            run_logger().warning(slow)
            step.show(f"warning: {slow}", lasting=True)

    return on_progress


def _lines(step: StepRun, folder: Path) -> Callable[[str], None]:
    """Callback that reports the program's other lines; what it says of stragglers stays on the terminal."""
    stragglers, news = from_the_end(folder / STRAGGLERS_FILE), set[str]()

    def on_line(line: str) -> None:
        # A comparison is written before its sentences are printed.
        news.update(sentence for one in read_comparisons(stragglers.read_new() or []) for sentence in one.news)
        step.say(line, lasting=line in news)

    return on_line


def _hang_watch(
    step: StepRun, folder: Path, hosts: Hosts
) -> Callable[[int, Path], AbstractContextManager[None]] | None:
    """Watch over ranks on this machine; `None` where the provider's program watches, or the cluster wants none."""
    least_s = read_cluster(step.context.config.cluster).recovery.hang_s
    if hosts.provider != LOCAL or least_s is None:
        return None
    return HangWatch(folder, hosts.ranks_per_node, least_s, partial(step.show, lasting=True)).over


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
    compared_by = {"tokens_per_second": figures["tokens_per_second"]} | _ratios(beside)
    step.tracker.log(context.parent_run_id, **tracked(compared_by, step.step)._asdict())
    if changes := result.get("changes"):
        for run_id in (step.run_id, context.parent_run_id):
            step.tracker.log(run_id, tags={"changes": "; ".join(changes)})
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
    """Name in the step's record of a figure of result.json: that of a series' last value has a `final_` before it."""
    return f"final_{SERIES[key].rpartition('/')[2]}" if key in SERIES else _RESULT_NAMES.get(key, key)


def _ratios(compared_with_plan: dict[str, float]) -> dict[str, float]:
    """Measured over predicted figures; the predictions themselves are the same for every run of a config."""
    return {key: value for key, value in compared_with_plan.items() if not key.startswith("predicted_")}


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
