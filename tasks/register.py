"""The register step: a version in the model registry, by reference, tagged with the evaluation's verdict."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE

from base import storage
from tasks.evaluate import UNTRAINED
from tasks.records.model_card import Subject, model_card, version_card
from tasks.steps import (
    REGISTRY_DELAYS_S,
    RunContext,
    StepRecord,
    StepRun,
    find_finished,
    perform,
    sections,
    worth_retrying,
)
from tasks.tracking.protocol import ModelVersion

# MLflow refuses longer tags of a version.
_TAG_CHARACTERS = 5000


@task(
    name="register",
    task_run_name="register",
    cache_policy=NO_CACHE,
    retries=3,
    retry_delay_seconds=REGISTRY_DELAYS_S,
    retry_condition_fn=worth_retrying,
)
def register(context: RunContext, exported: StepRecord, quantized: StepRecord, evaluated: StepRecord) -> StepRecord:
    """Register the candidate; it becomes champion when the evaluation found it better than the champion of this moment.

    Where other runs have made another version champion since the evaluation, it does not; see `is_outdated`.
    """
    inputs = {
        **sections(context.config, ["register_model"]),
        "export_fingerprint": exported.fingerprint,
        "evaluate_fingerprint": evaluated.fingerprint,
        "place": _lasting(exported.outputs["export"]),  # registered again where a run is moved
        "attempt": _attempt(context),
    }

    def work(step: StepRun) -> dict[str, str]:
        config, registry = context.config.register_model, context.tracker().registry
        result = storage.read_json(evaluated.outputs["evaluation"])
        tags = {
            "run": context.config.name,
            "quantized_uri": _lasting(quantized.outputs["quantized"]),
            "export_fingerprint": exported.fingerprint,
            "quantize_fingerprint": quantized.fingerprint,
            "verdict": result["verdict"],
            "reason": result["reason"][:_TAG_CHARACTERS],
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
        if storage.damage(version.uri):  # an earlier place of this same run
            registry.annotate(version, tags={"uri": _lasting(exported.outputs["export"])})
        for run_id in (step.run_id, context.parent_run_id):
            step.tracker.log(run_id, outputs=[version])
        # The candidate was no version yet when it was evaluated.
        step.tracker.log(evaluated.run_id, inputs=[version])
        reason, remark = _promote(context, version, result)
        became = {"became_champion": str(reason is None).lower()}
        registry.annotate(version, tags=became)
        step.tracker.log(context.parent_run_id, tags=became)
        card = version_card(_subject(context, version), result)
        registry.annotate(version, card=card, model_card=model_card(config))
        step.metrics(version=version.version)
        aliases = config.candidate_alias + (f", {config.champion_alias}" if reason is None else "")
        step.say(f"{version.name} version {version.version}: {aliases}{remark}")
        target = str(context.path / "register.json")
        made = {"name": version.name, "version": version.version, "identity": identity, "champion": reason is None}
        made |= {"champion_reason": reason, "attempt": inputs["attempt"]}
        made["outdated"] = result["verdict"] == "better" and reason is not None
        storage.write_json(target, made)
        return {"register": target}

    return perform(context, "register", inputs, work)


def is_outdated(registered: StepRecord) -> bool:
    """Whether the candidate was better than a champion that was no longer the champion when it was registered."""
    return bool(storage.read_json(registered.outputs["register"]).get("outdated"))


def _attempt(context: RunContext) -> int:
    """Number of attempts of this run before that count no more.

    One that failed to replace the champion is no finished step, nor is one whose version the registry has lost.
    """
    record = find_finished(context.path, "register")
    before = storage.read_json(record.outputs["register"]) if record is not None else {}
    return int(before.get("attempt", 0)) + bool(before and (before.get("outdated") or _is_lost(context, before)))


def _is_lost(context: RunContext, registered: Mapping[str, Any]) -> bool:
    """Whether the registry has no such version, as after its database was removed, or another run's in its place."""
    found = context.tracker().registry.version(registered["name"], number=int(registered["version"]))
    return found is None or registered.get("identity") not in (None, found.tags.get("cherry.identity"))


def _promote(context: RunContext, version: ModelVersion, result: Mapping[str, Any]) -> tuple[str | None, str]:
    """Why the version has not become the champion, `None` if it has, and a remark for a person, which may be empty."""
    if result["verdict"] != "better":
        return f"it was not found better than {result['baseline']}", _without_champion(result)
    config, registry = context.config.register_model, context.tracker().registry
    champion, replacing = registry.version(config.model_name, alias=config.champion_alias), result["baseline_version"]
    if champion is not None and champion.tags.get("export_fingerprint") == version.tags["export_fingerprint"]:
        replacing = champion.version  # the same weights, quantized anew or in another place: as good as itself
    if registry.set_alias(config.model_name, config.champion_alias, version.version, replacing=replacing):
        return None, _without_champion(result)
    reason = (
        f"another version became the {config.champion_alias} while this one was compared with {result['baseline']}, "
        "and stays until the two are compared, as the same command does"
    )
    return reason, f" ({reason})"


def _subject(context: RunContext, version: ModelVersion) -> Subject:
    quantized = version.tags["quantized_uri"]
    return Subject(version.version, context.config, context.path, context.parent_run_id, version.uri, quantized)


def _without_champion(result: Mapping[str, Any]) -> str:
    """A remark in brackets when there was no champion to compare with; else empty."""
    if result["champion_missing"]:
        return f" ({result['champion_missing']})"
    return " (there was no champion to beat but the untrained model)" if result["baseline"] == UNTRAINED else ""


def _lasting(uri: str) -> str:
    """The URI, with an absolute path if it is local."""
    return str(Path(storage.local_path(uri)).absolute()) if storage.is_local(uri) else uri
