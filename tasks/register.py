"""Owns the register step: a version in the model registry, by reference, with the figures that decided.

It knows nothing of how the verdict came about.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE

from base import storage
from tasks.evaluate import UNTRAINED
from tasks.steps import REGISTRY_DELAYS_S, RunContext, StepRecord, StepRun, perform, sections, worth_retrying

# MLflow refuses longer tags of a version.
_TAG_CHARACTERS = 5000


@task(
    name="register",
    cache_policy=NO_CACHE,
    retries=3,
    retry_delay_seconds=REGISTRY_DELAYS_S,
    retry_condition_fn=worth_retrying,
)
def register(context: RunContext, exported: StepRecord, quantized: StepRecord, evaluated: StepRecord) -> StepRecord:
    """Register the candidate; it becomes champion when it is better than the one before it."""
    inputs = {
        **sections(context.config, ["register_model"]),
        "export_fingerprint": exported.fingerprint,
        "evaluate_fingerprint": evaluated.fingerprint,
    }

    def work(step: StepRun) -> dict[str, str]:
        config, tracker = context.config.register_model, context.tracker()
        result = storage.read_json(evaluated.outputs["evaluation"])
        tags = {
            "run": context.config.name,
            "quantized_uri": _lasting(quantized.outputs["quantized"]),
            "export_fingerprint": exported.fingerprint,
            "quantize_fingerprint": quantized.fingerprint,
            "config": json.dumps(context.config.model_dump(mode="json", exclude_unset=True))[:_TAG_CHARACTERS],
            "verdict": result["verdict"],
            "compared_with": result["baseline"],
            "quantized_passed": str(result["quantized_passed"]).lower(),
            "quantized_reason": result["quantized_reason"],
            "heldout_bits_per_byte": f"{result['bits_per_byte']:.4f}",
            "parent_run_id": context.parent_run_id or "",
        }
        identity = storage.fingerprint([exported.fingerprint, quantized.fingerprint, context.key])
        version = tracker.register(
            step.run_id,
            config.model_name,
            _lasting(exported.outputs["export"]),
            identity=identity,
            alias=config.candidate_alias,
            tags=tags,
        )
        if version.model_id is not None:
            for run_id in (step.run_id, context.parent_run_id):
                tracker.models(run_id, outputs=[version.model_id])
            # The candidate had no id yet when it was evaluated.
            tracker.models(evaluated.mlflow_run_id, inputs=[version.model_id])
        champion = result["verdict"] == "better"
        if champion:
            tracker.set_alias(config.model_name, config.champion_alias, version.version)
        step.metrics(version=version.version)
        step.say(
            f"{version.name} version {version.version}: {config.candidate_alias}"
            + (f", {config.champion_alias}" if champion else "")
            + _without_champion(result)
        )
        target = str(context.path / "register.json")
        made = {"name": version.name, "version": version.version, "identity": identity, "champion": champion}
        storage.write_json(target, made)
        return {"register": target}

    return perform(context, "register", inputs, work)


def _without_champion(result: dict[str, Any]) -> str:
    if result["champion_missing"]:
        return f" ({result['champion_missing']})"
    return " (there was no champion to beat but the untrained model)" if result["baseline"] == UNTRAINED else ""


def _lasting(uri: str) -> str:
    """A URI that means the same from any working directory."""
    return str(Path(storage.local_path(uri)).absolute()) if storage.is_local(uri) else uri
