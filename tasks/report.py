"""Owns the beginning and the end of a flow's run: its MLflow parent run, its summary, and cleaning up after a death.

It knows the files that the steps leave, not how they are made.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from prefect import get_run_logger, runtime
from prefect.artifacts import create_table_artifact
from pydantic import BaseModel

from base import storage
from base.config import dump
from base.errors import CherryError
from tasks.parameters import resolve, run_directory, write_resolved
from tasks.process import end_tree
from tasks.provision import is_alive
from tasks.steps import RunContext, StepRecord, find_finished, flatten

TRAIN_STEPS = ("provision", "data", "train", "export", "quantize", "evaluate", "register")
STEPS = (*TRAIN_STEPS, "deploy")
RELEASE_CONFIG = "release.yaml"
"""What a deployment was told, beside the config.yaml that the run was trained with."""


def begin(config: str, overrides: BaseModel) -> RunContext:
    """Resolve the config once, write it into the run directory, and open the flow's MLflow run.

    Raises:
        MissingFileError, ConfigError: see `tasks.parameters.resolve`.
    """
    resolved = resolve(config, overrides)
    context = _open(RunContext(write_resolved(resolved), resolved), "flow")
    context.tracker().log(context.parent_run_id, params=flatten(resolved.model_dump(mode="json")))
    return context


def begin_release(config: str, overrides: BaseModel) -> RunContext:
    """The same for a deployment, which finds its run directory as training left it."""
    resolved = resolve(config, overrides)
    directory = run_directory(resolved)
    if not Path(directory, "config.yaml").exists():
        write_resolved(resolved)
    storage.write_bytes(storage.join(directory, RELEASE_CONFIG), dump(resolved).encode())
    return _open(RunContext(directory, resolved), "flow")


def _open(context: RunContext, step: str) -> RunContext:
    tracker = context.tracker()
    identity = storage.fingerprint({"directory": context.directory, **_lasting(context)})
    parent = tracker.start(context.config.name, parent=None, step=step, identity=identity)
    tracker.log(parent, tags={"prefect_flow_run": str(runtime.flow_run.id), "directory": context.directory})
    get_run_logger().info("run %s in %s, tracked at %s", context.config.name, context.directory, tracker.uri)
    return RunContext(context.directory, context.config, parent, context.began)


def _lasting(context: RunContext) -> dict[str, Any]:
    """The config without what may change between two looks at one run: how it is retried, served and tracked."""
    values = context.config.model_dump(mode="json")
    return {key: value for key, value in values.items() if key not in ("retry", "serve", "deploy", "tracking")}


def conclude(context: RunContext, status: str) -> dict[str, Any]:
    """Close the flow's MLflow run, show the steps as a table in Prefect, and write summary.json when all are done."""
    records = [record for step in TRAIN_STEPS if (record := find_finished(context.path, step)) is not None]
    tracker = context.tracker()
    summary: dict[str, Any] = {}
    if status == "FINISHED":
        summary = summarize(context.path)
        storage.write_json(str(context.path / "summary.json"), summary)
        tracker.artifact(context.parent_run_id, context.path / "summary.json")
        tracker.log(context.parent_run_id, tags={"mlflow.note.content": _describe(summary)})
        tracker.artifact(context.parent_run_id, context.path / "config.yaml")
        create_table_artifact(_rows(records), key=f"run-{context.config.name}", description=_describe(summary))
    tracker.finish(context.parent_run_id, status)
    return summary


def summarize(directory: Path) -> dict[str, Any]:
    """The headline figures of a run whose training flow finished, from its files.

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
        "verdict": evaluation["verdict"],
        "reason": evaluation["reason"],
        "compared_with": evaluation["baseline"],
        "mlflow_run_id": records["register"].mlflow_parent_run_id if "register" in records else None,
        "seconds": {step: round(record.seconds, 3) for step, record in records.items()},
    }


def _rows(records: list[StepRecord]) -> list[dict[str, Any]]:
    return [
        {
            "step": record.step,
            "seconds": round(record.seconds, 1),
            "output": ", ".join(record.outputs.values()),
            "figures": json.dumps({key: round(value, 4) for key, value in list(record.figures.items())[:6]}),
        }
        for record in records
    ]


def _describe(summary: dict[str, Any]) -> str:
    return (
        f"**{summary['verdict']}** than {summary['compared_with']}: {summary['reason']}\n\n"
        f"Held-out {summary['heldout_bits_per_byte']:.3f} bits per byte (zlib {summary['zlib_bits_per_byte']:.3f}), "
        f"loss {summary['loss_first']:.3f} to {summary['loss_last']:.3f}, int8 at "
        f"{summary['quantized_bytes_ratio']:.2f} of the bytes for {summary['quantized_dnll']:+.4f} nats per token."
    )


def teardown(flow: Any, flow_run: Any, state: Any) -> None:
    """Prefect's hook after a cancellation or a crash: it runs in another process, so it works from disk alone.

    What the flow's process could not end itself (it was killed outright) is ended here.
    """
    try:
        context = resolve(
            flow_run.parameters.get("config", "configs/tiny.yaml"), flow_run.parameters.get("overrides") or {}
        )
        lease = Path(run_directory(context)) / "lease.json"
        if lease.exists():
            holder = storage.read_json(str(lease))
            if is_alive(holder["pid"], holder["created"]):
                return  # the process still works, or cleans up by itself
            lease.unlink()
        program = Path(run_directory(context)) / "program.json"
        if program.exists():
            record = storage.read_json(str(program))
            if is_alive(record["pid"], record["created"]):
                end_tree(record["pid"])
    except CherryError as error:
        get_run_logger().warning("nothing to tear down: %s", error)
