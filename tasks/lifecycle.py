"""Begin and end of a flow run: resolved config, lease, MLflow parent run, summary, and clean-up after a crash."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from prefect import runtime
from pydantic import BaseModel

from base import storage
from base.config import dump
from base.lost_output import outlive_output
from cherry.train_record import FLOW_SERIES
from tasks.artifacts import show_markdown, show_table
from tasks.inputs import check_inputs, check_serving
from tasks.interruptions.leftovers import FLOW_RUN, end_leftovers
from tasks.lease import take_lease
from tasks.overrides import ConfigParameter, resolve, run_directory, write_resolved
from tasks.processes.loopback import keep_loopback_from_proxies
from tasks.records.environment import cost_figures, device_of
from tasks.records.events import line_of, write_event
from tasks.records.figures import Tracked, seconds_of, tracked
from tasks.restarts import refuse_endless_restarts, starts_before, wait_for_holder
from tasks.run_config import RunConfig
from tasks.run_logger import run_logger
from tasks.steps import RunContext, StepRecord, find_finished, flatten, run_key, write_record
from tasks.tracking.connect import connect
from tasks.tracking.metrics_relay import MetricsRelay
from tasks.tracking.protocol import RunStatus

TRAIN_STEPS = ("provision", "data", "train", "export", "quantize", "evaluate", "register")
STEPS = (*TRAIN_STEPS, "deploy")
RELEASE_CONFIG = "release.yaml"
"""The config of the newest release, beside the config.yaml that the run was trained with."""
HELD = "held.json"
"""Seconds for which the attempts of the flow's tracked run held their hosts."""
_PLOTS = {"provision": "plots/*.png", "train": "train/plots/*.png", "quantize": "quantized/*.png"}
_PLOTS |= {"evaluate": "evaluate/*.png"}


def begin(config: ConfigParameter, overrides: BaseModel) -> RunContext:
    """Resolve the config, take the run directory, write config.yaml into it, and open the flow's MLflow run.

    Raises:
        MissingFileError, ConfigError: see `tasks.overrides.resolve`.
        OperationalError: a live process is working on the same run.
        InvalidInputError: the flow run was cancelled, or was started `retry.attempts` times before.
    """
    outlive_output()
    keep_loopback_from_proxies()
    starts = starts_before()
    resolved = resolve(config, overrides)
    check_inputs(resolved)
    if starts:
        refuse_endless_restarts(starts, resolved.retry.attempts)
        wait_for_holder(Path(run_directory(resolved)))
    _open_tracker(resolved)
    end_leftovers(resolved)
    # Before anything is written: a live run's trainer reads config.yaml when it is started again.
    take_lease(Path(run_directory(resolved)))
    directory = write_resolved(resolved)
    context = RunContext(directory, resolved, _open_flow_run(resolved, directory))
    tracker = context.tracker().runs
    tracker.log(context.parent_run_id, params=flatten(resolved.model_dump(mode="json")))
    tracker.artifact(context.parent_run_id, context.path / "config.yaml")
    return context


def _open_tracker(config: RunConfig) -> None:
    """Check the tracker before anything is computed; what it loses later is shown beside the steps at once.

    Raises:
        CherryError: see `Tracker.open`.
    """
    directory = Path(run_directory(config))

    def on_outage(line: str) -> None:
        if directory.is_dir():
            write_event(directory, "tracking", "progress", line=line)

    connect(config.tracking, config.runs_directory).open(on_outage)


def begin_release(config: ConfigParameter, overrides: BaseModel) -> RunContext:
    """Resolve the config of a release and check what it needs, before anything is written or started.

    Raises:
        MissingFileError, ConfigError: see `tasks.overrides.resolve`.
        InvalidInputError: the flow run was cancelled, or was started `retry.attempts` times before.
        CherryError: see `tasks.inputs.check_serving` and `Tracker.open`.
    """
    outlive_output()
    keep_loopback_from_proxies()
    starts = starts_before()
    resolved = resolve(config, overrides)
    refuse_endless_restarts(starts, resolved.retry.attempts)
    directory = run_directory(resolved)
    check_serving(resolved)
    _open_tracker(resolved)
    return RunContext(directory, resolved)


@contextmanager
def open_release(context: RunContext) -> Iterator[RunContext]:
    """Context with the run directory and the flow's tracked run as training left them, or new ones."""
    config, directory = context.config, context.directory
    if not (context.path / "config.yaml").exists():
        write_resolved(config)
    storage.write_bytes(storage.join(directory, RELEASE_CONFIG), dump(config).encode())
    registered = find_finished(context.path, "register")
    if registered is not None and registered.parent_run_id is not None:
        yield replace(context, parent_run_id=registered.parent_run_id)
        return
    parent = _open_flow_run(config, directory)
    status: RunStatus = "FINISHED"
    try:
        yield replace(context, parent_run_id=parent)
    except BaseException as error:
        status = "FAILED" if isinstance(error, Exception) else "KILLED"
        raise
    finally:
        context.tracker().runs.finish(parent, status)


def _open_flow_run(config: RunConfig, directory: str) -> str | None:
    """Id of the flow's tracked run, started or found again; `None` when the tracking server could not be reached."""
    tracker, path = connect(config.tracking, config.runs_directory), Path(directory)
    identity = storage.fingerprint(_lasting(config))
    run_id = tracker.runs.start(config.name, parent=None, step="flow", identity=identity, run_key=run_key(path))
    storage.write_json(str(path / FLOW_RUN), {"run_id": run_id})
    tracker.runs.log(
        run_id,
        tags={
            "prefect_flow_run": str(runtime.flow_run.id),
            "directory": directory,
            "device": device_of(config),
        },
    )
    run_logger().info("run %s in %s, tracked at %s", config.name, directory, tracker.address)
    return run_id


def _lasting(config: RunConfig) -> dict[str, Any]:
    """The config's values without those sections that may change while a run lasts: retries, serving, tracking."""
    values = config.model_dump(mode="json")
    return {key: value for key, value in values.items() if key not in ("plan", "retry", "serve", "deploy", "tracking")}


def conclude(context: RunContext, status: RunStatus, error: BaseException | None = None) -> dict[str, Any]:
    """End the flow's tracked run as FINISHED, FAILED or KILLED; returns the summary, empty unless it finished.

    A run that failed gets the `error` as its description. Also shows the steps in Prefect, and writes summary.json when
    all are done.
    """
    tracker, parent = context.tracker().runs, context.parent_run_id
    records = [record for step in TRAIN_STEPS if (record := find_finished(context.path, step)) is not None]
    summary: dict[str, Any] = {}
    text = f"Ended as {status.lower()} after {len(records)} of {len(TRAIN_STEPS)} steps."
    # A failed run may stand beside the steps of another config's.
    figures = {seconds_of(record.step): record.seconds for record in records if record.parent_run_id == parent}
    tags: dict[str, str] = {}
    if status == "FINISHED":
        summary = summarize(context.path)
        text = _describe(summary)
        storage.write_json(str(context.path / "summary.json"), summary)
        records = _catch_up(context, records)
        figures, tags = _headline(summary)
        _show_reused(context, records)
        tracker.log(parent, note=text, tags=_reused(context, records))
        tracker.artifact(parent, context.path / "summary.json")
        show_markdown(f"links-{context.config.name}", _links(context, records), "Where to look")
    elif error is not None:
        tracker.log(parent, note=f"{text} {line_of(error)}")
    tracker.log(parent, metrics=figures | _cost(context), tags=tags)
    show_table(f"run-{context.config.name}", _rows(context, records), text)
    tracker.finish(parent, status)
    return summary


def _catch_up(context: RunContext, records: list[StepRecord]) -> list[StepRecord]:
    """Step records, after sending the tracker what an outage has kept from it: runs, training metrics, final states."""
    tracker, updated = context.tracker().runs, []
    for record in records:
        if record.run_id is None:
            name = f"{context.config.name}-{record.step}"
            run_id = tracker.start(
                name,
                parent=context.parent_run_id,
                step=record.step,
                identity=record.fingerprint,
                run_key=context.key,
            )
            tracker.log(run_id, **tracked(record.figures, record.step)._asdict())
            record = replace(record, run_id=run_id, parent_run_id=context.parent_run_id, reused=False)
            write_record(context.path, record)
        if record.step == "train":
            MetricsRelay(context.path / "train", tracker, record.run_id).send_new()
            MetricsRelay(context.path / "train", tracker, context.parent_run_id, FLOW_SERIES).send_new()
        updated.append(record)
    tracker.finish(context.parent_run_id, "FINISHED", family=True)
    return updated


def _headline(summary: dict[str, Any]) -> Tracked:
    """Figures that runs are compared by."""
    found = tracked(summary, "flow")
    return found._replace(metrics=found.metrics | {seconds_of(step): s for step, s in summary["seconds"].items()})


def _cost(context: RunContext) -> dict[str, float]:
    """Cost of the flow's run so far, by name in the tracker: of this attempt and of those before it.

    An attempt that was killed outright is left out.
    """
    path, seconds = context.path / HELD, time.time() - context.began
    before = storage.read_json(str(path)) if path.exists() else {}
    same = before.get("run_id") == context.parent_run_id
    held = {attempt: s for attempt, s in before.get("seconds", {}).items() if same} | {str(context.began): seconds}
    storage.write_json(str(path), {"run_id": context.parent_run_id, "seconds": held})
    return cost_figures(context.config, sum(held.values()))


def _show_reused(context: RunContext, records: list[StepRecord]) -> None:
    """Add plots and the comparison with the plan, of steps that another flow's run has made, to this one."""
    tracker, parent = context.tracker().runs, context.parent_run_id
    for record in records:
        if record.parent_run_id != parent:
            ratios = {key: value for key, value in record.figures.items() if key.endswith("_over_plan")}
            tracker.log(parent, metrics=tracked(ratios, record.step).metrics)
            for path in sorted(context.path.glob(_PLOTS[record.step])) if record.step in _PLOTS else ():
                tracker.artifact(parent, path, "plots")


def _is_reused(context: RunContext, record: StepRecord) -> bool:
    return record.finished_at < context.began


def _reused(context: RunContext, records: list[StepRecord]) -> dict[str, str]:
    """Tags with the MLflow runs of the steps that an earlier flow run finished."""
    return {
        f"cherry.reused.{record.step}": record.run_id
        for record in records
        if record.run_id is not None and record.parent_run_id != context.parent_run_id
    }


def summarize(directory: Path) -> dict[str, Any]:
    """Summary of a run whose training flow finished: its main figures, read from its files.

    Raises:
        MissingFileError: a step has not finished; the text names the file that it would have written.
    """
    train, data, evaluation, quantization = (
        storage.read_json(str(directory / name))
        for name in (
            "train/result.json",
            "data/manifest.json",
            "evaluate/evaluation.json",
            "quantized/quantization.json",
        )
    )
    records = {step: record for step in STEPS if (record := find_finished(directory, step)) is not None}
    registered = storage.read_json(records["register"].outputs["register"]) if "register" in records else {}
    return {
        "name": directory.name,
        "loss_first": train["loss_first"],
        "loss_last": train["loss_last"],
        "heldout_loss": evaluation["heldout_loss"],
        "heldout_bits_per_byte": evaluation["bits_per_byte"],
        "zlib_bits_per_byte": evaluation["zlib_bits_per_byte"],
        "tokens": train["tokens"],
        "parameters": train["parameters"],
        "tokens_per_second": train["tokens_per_second"],
        "documents": data["documents"],
        "data_bytes": data["bytes"],
        "data_digest": data["digest"],
        "quantized_bytes_ratio": quantization["bytes_after"] / quantization["bytes_before"],
        "quantized_dnll": evaluation["quantized_dnll"],
        "formats": evaluation.get("formats", []),
        "verdict": evaluation["verdict"],
        "reason": evaluation["reason"],
        "compared_with": evaluation["baseline"],
        "champion": bool(registered.get("champion")),
        "champion_reason": registered.get("champion_reason"),
        "run_id": records["register"].parent_run_id if "register" in records else None,
        "seconds": {step: round(record.seconds, 3) for step, record in records.items()},
    }


def _rows(context: RunContext, records: list[StepRecord]) -> list[dict[str, Any]]:
    return [
        {
            "step": record.step,
            "seconds": round(record.seconds, 1),
            "reused": "found finished" if _is_reused(context, record) else "",
            "figures": ", ".join(f"{key} {_readable(value)}" for key, value in list(record.figures.items())[:6]),
            "output": ", ".join(record.outputs.values()),
        }
        for record in records
    ]


def _readable(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"


def _links(context: RunContext, records: list[StepRecord]) -> str:
    """Markdown with the runs in the tracker, as links where it has pages, and the run's files."""
    tracker = context.tracker()
    runs = {"flow": context.parent_run_id, **{record.step: record.run_id for record in records}}
    lines = [f"- {step}: {tracker.page(run)}" for step, run in runs.items() if run is not None]
    return "\n".join(
        [
            f"# {context.config.name}",
            f"Files: `{context.path.absolute()}`; the metrics stream is `train/metrics.jsonl`.",
            f"Tracked runs (`{tracker.page()}`):",
            "",
            *lines,
        ]
    )


def judged(summary: Mapping[str, Any]) -> str:
    """The verdict's reason, and why a version that was found better is not the champion all the same."""
    if summary["verdict"] != "better" or summary["champion"]:
        return str(summary["reason"])
    return f"{summary['reason']} It did not become the champion: {summary['champion_reason']}."


def _describe(summary: dict[str, Any]) -> str:
    return (
        f"**{summary['verdict']}** than {summary['compared_with']}: {judged(summary)}\n\n"
        f"Held-out {summary['heldout_bits_per_byte']:.3f} bits per byte (zlib {summary['zlib_bits_per_byte']:.3f}), "
        f"loss {summary['loss_first']:.3f} to {summary['loss_last']:.3f}, quantized at "
        f"{summary['quantized_bytes_ratio']:.2f} of the bytes for {summary['quantized_dnll']:+.4f} nats per token."
    )
