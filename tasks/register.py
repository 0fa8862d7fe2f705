"""The register step: a version in the model registry, by reference, tagged with the evaluation's verdict."""

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
    """Register the candidate; it becomes champion when the evaluation found it better than the champion."""
    inputs = {
        **sections(context.config, ["register_model"]),
        "export_fingerprint": exported.fingerprint,
        "evaluate_fingerprint": evaluated.fingerprint,
    }

    def work(step: StepRun) -> dict[str, str]:
        config, registry = context.config.register_model, context.tracker().registry
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
        version = registry.register(
            step.run_id,
            config.model_name,
            _lasting(exported.outputs["export"]),
            identity=identity,
            alias=config.candidate_alias,
            tags=tags,
        )
        for run_id in (step.run_id, context.parent_run_id):
            step.tracker.log(run_id, outputs=[version])
        # The candidate was no version yet when it was evaluated.
        step.tracker.log(evaluated.run_id, inputs=[version])
        champion = result["verdict"] == "better"
        if champion:
            registry.set_alias(config.model_name, config.champion_alias, version.version)
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
    """A remark in brackets when there was no champion to compare with; else empty."""
    if result["champion_missing"]:
        return f" ({result['champion_missing']})"
    return " (there was no champion to beat but the untrained model)" if result["baseline"] == UNTRAINED else ""


def _lasting(uri: str) -> str:
    """The URI, with an absolute path if it is local."""
    return str(Path(storage.local_path(uri)).absolute()) if storage.is_local(uri) else uri
