"""Evaluate step: candidate, quantized candidate and champion on the same held-out documents, and a verdict.

Models are scored by cherry/scoring.py, and compared by anything/statistics/compare.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE

from anything.statistics.compare import compare
from base import storage
from model.numerics.formats import FORMATS
from model.quantization.report import REPORT_NAME
from tasks.artifacts import show_table
from tasks.files.outputs import find_output
from tasks.plots import plot_comparison, plot_formats
from tasks.records.figures import difference_of, tracked
from tasks.records.quality import BOUNDS, ESTIMATES, judge_quantized, pairs
from tasks.records.quantized_format import (
    OUTPUT,
    chosen_format,
    closer_method,
    compared_formats,
    next_milder,
    output_of,
)
from tasks.run_config import RunConfig
from tasks.run_logger import run_logger
from tasks.steps import (
    REGISTRY_DELAYS_S,
    RunContext,
    StepRecord,
    StepRun,
    perform,
    sections,
    worth_retrying,
)
from tasks.tracking.protocol import Dataset, ModelVersion

UNTRAINED = "untrained"
SCORES = "nll-{}.json"
"""File of a model's scores in the evaluation's folder, by the model's part in it."""


@task(
    name="evaluate",
    task_run_name="evaluate",
    cache_policy=NO_CACHE,
    retries=3,
    retry_delay_seconds=REGISTRY_DELAYS_S,
    retry_condition_fn=worth_retrying,
)
def evaluate(context: RunContext, data: StepRecord, exported: StepRecord, quantized: StepRecord) -> StepRecord:
    """Record of the comparison of the candidate with the champion, or with the untrained model where there is none."""
    champion, missing = find_champion(context, exported)
    inputs = {
        **sections(context.config, ["evaluate", "quantize"]),
        "data_fingerprint": data.fingerprint,
        "export_fingerprint": exported.fingerprint,
        "quantize_fingerprint": quantized.fingerprint,
        "baseline": missing or _label(champion),
    }

    def work(step: StepRun) -> dict[str, str]:
        folder = context.path / "evaluate"
        _record_inputs(context, step, champion)
        baseline = (
            ["--model_path", champion.uri]
            if champion
            else ["--untrained", "--config", f"{context.directory}/config.yaml"]
        )
        export = exported.outputs["export"]
        models = {"baseline": baseline} | {
            name: ["--model_path", path, "--reference", export] for name, path in quantized.outputs.items()
        }
        scores = {name: _score(context, step, name, arguments, folder) for name, arguments in models.items()}
        scores["candidate"] = {"model": export, **scores[OUTPUT]["reference"]}
        storage.write_json(str(folder / SCORES.format("candidate")), scores["candidate"])
        for name in ("baseline", "candidate", OUTPUT):
            loss, bits = (scores[name][key] for key in ("loss", "bits_per_byte"))
            step.metrics(**{f"{name}_loss": loss, f"{name}_bits_per_byte": bits})
        result = verdicts(context.config, scores, _label(champion), missing)
        result["baseline_version"] = None if champion is None else champion.version
        result["formats"] = formats(context.config, scores, quantized.outputs)
        return _report(context, step, result, folder)

    return perform(context, "evaluate", inputs, work)


def _label(champion: ModelVersion | None) -> str:
    return champion.title if champion else UNTRAINED


def find_champion(context: RunContext, exported: StepRecord) -> tuple[ModelVersion | None, str | None]:
    """Registered champion to compare with; where it is this same model, the newest before it that is another one.

    Returns:
        The champion, and a sentence for one whose weights are gone.
    """
    config, registry = context.config.register_model, context.tracker().registry
    found = registry.version(config.model_name, alias=config.champion_alias)
    seen: set[int] = set()  # versions that have replaced each other in turn
    while found is not None and found.tags.get("export_fingerprint") == exported.fingerprint:
        seen.add(found.version)
        before = found.tags.get(f"previous_{config.champion_alias}")
        found = registry.version(config.model_name, number=int(before)) if before and int(before) not in seen else None
    if found is None:
        return None, None
    uri = find_output(found.uri, found.tags.get("export_fingerprint", ""), context.config.runs_directory)
    if damage := storage.damage(uri):
        missing = (
            f"{_label(found)}, the {config.champion_alias}, cannot be compared with: its weights are gone "
            f"({uri}: {damage})"
        )
        run_logger().warning(missing)
        return None, missing
    return replace(found, uri=uri), None


def _record_inputs(context: RunContext, step: StepRun, champion: ModelVersion | None) -> None:
    """Record held-out documents and champion as inputs; the candidate has no id before the register step adds it."""
    manifest = storage.read_json(f"{context.directory}/data/manifest.json")
    heldout = {key: manifest["heldout"][key] for key in ("documents", "bytes")}
    dataset = Dataset(
        name=f"{manifest['source']} held out",
        digest=manifest["digest"],
        source=str(context.path.absolute() / "data" / "heldout.jsonl"),
        profile=heldout,
        use="evaluation",
    )
    step.tracker.log(step.run_id, inputs=[dataset, *([] if champion is None else [champion])])


def _score(context: RunContext, step: StepRun, name: str, model: list[str], folder: Path) -> dict[str, Any]:
    """Scores of one model on the held-out documents, from a program of its own."""
    output = folder / SCORES.format(name)
    arguments = [*model, "--data_dir", f"{context.directory}/data", "--output", str(output)]
    evaluation = context.config.evaluate
    arguments += ["--documents", str(evaluation.documents), "--max_tokens", str(evaluation.max_document_tokens)]
    step.run(
        "cherry.scoring",
        arguments,
        on_line=lambda line: step.say(f"{name}: {line}"),
        on_progress=lambda line, _: step.say(f"{name}: {line}"),  # of one of several models
    )
    result: dict[str, Any] = storage.read_json(str(output))
    return result


def verdicts(
    config: RunConfig, scores: Mapping[str, dict[str, Any]], baseline: str, missing: str | None = None
) -> dict[str, Any]:
    """Content of evaluation.json: the verdicts on the candidate and on its quantized weights, with their figures.

    A champion that is `missing` cannot be beaten: however the candidate compares with the untrained model, it must not
    replace the champion by itself.
    """
    against = compare(
        pairs(scores["baseline"]),
        pairs(scores["candidate"]),
        margin=config.evaluate.margin_nats,
        confidence=config.evaluate.confidence,
        bootstrap_samples=config.evaluate.bootstrap_samples,
        seed=config.evaluate.seed,
    )
    verdict, reason = against.verdict, against.reason
    if missing is not None:
        alias = config.register_model.champion_alias
        reason = (
            f"{missing}. Restore them and run the flow again, or remove the alias {alias}. "
            f"Against the untrained model it is {verdict}: {reason}"
        )
        verdict = "can't tell"
    return {
        "verdict": verdict,
        "reason": reason,
        "baseline": baseline,
        "champion_missing": missing,
        "candidate_vs_baseline": asdict(against),
        **judge_quantized(
            config, scores["candidate"], scores[OUTPUT], milder=next_milder(config), closer=closer_method(config)
        ),
        "bits_per_byte": scores["candidate"]["bits_per_byte"],
        "zlib_bits_per_byte": scores["candidate"]["zlib_bits_per_byte"],
        "heldout_loss": scores["candidate"]["loss"],
        "documents": against.documents,
    }


def formats(
    config: RunConfig, scores: Mapping[str, dict[str, Any]], folders: Mapping[str, str]
) -> list[dict[str, Any]]:
    """A row for each format that was quantized in, the run's own first: size, what it costs, and whether it passes.

    Args:
        folders: the quantized weights, by the name of their scores.
    """
    names = {OUTPUT: chosen_format(config).name} | {output_of(name): name for name in compared_formats(config)}
    rows = []
    for output, name in names.items():
        judged = judge_quantized(config, scores["candidate"], scores[output], milder=FORMATS[name].milder)
        report = storage.read_json(storage.join(folders[output], REPORT_NAME))
        keys = (*ESTIMATES, *BOUNDS, "quantized_passed", "quantized_reason")
        row = {"format": name, "bytes_ratio": report["bytes_after"] / report["bytes_before"]}
        row |= {key.removeprefix("quantized_"): judged[key] for key in keys}
        cost = judged["quantized_vs_candidate"]
        rows.append(row | {"dnll_low": cost["low"], "dnll_high": cost["high"]})
    return rows


def shortfall(compared: int, wanted: int) -> str | None:
    """A warning when fewer documents were compared than `evaluate.documents` asks for, else `None`."""
    if compared >= wanted:
        return None
    return (
        f"compared on {compared} documents, evaluate.documents asks for {wanted}: no more with text that counts are "
        "held out. data.heldout_fraction holds out more"
    )


def _report(context: RunContext, step: StepRun, result: dict[str, Any], folder: Path) -> dict[str, str]:
    """Write evaluation.json, and log figures, plot and table."""
    config, baseline = context.config, result["baseline"]
    against, cost = result["candidate_vs_baseline"], result["quantized_vs_candidate"]
    storage.write_json(str(folder / "evaluation.json"), result)
    rows = [
        (f"candidate - {baseline}", against["difference"], against["low"], against["high"]),
        ("quantized - candidate", cost["difference"], cost["low"], cost["high"]),
    ]
    plot = plot_comparison(rows, config.evaluate.margin_nats, folder / "comparison.png")
    headline = tracked(
        {
            "heldout_bits_per_byte": result["bits_per_byte"],
            "heldout_loss": result["heldout_loss"],
            "heldout_documents": result["documents"],
            "zlib_bits_per_byte": result["zlib_bits_per_byte"],
            **{key: result[key] for key in ESTIMATES},
        },
        step.step,
    )
    limits = {
        "minimum_detectable_effect": against["minimum_detectable_effect"],
        **{key: result[key] for key in BOUNDS},
    }
    differences = {difference_of(baseline, key): against[key] for key in ("difference", "low", "high")}
    told = {"verdict": result["verdict"], "reason": result["reason"], "baseline": baseline}
    for run_id in (step.run_id, context.parent_run_id):
        step.tracker.artifact(run_id, plot, "plots")
        step.tracker.log(run_id, metrics=headline.metrics, tags=headline.tags | told)
    step.tracker.log(step.run_id, metrics=tracked(limits, step.step).metrics | differences)
    step.tracker.artifact(step.run_id, folder / "evaluation.json")
    _show_formats(step, result["formats"])
    show_table(
        f"evaluate-{config.name}",
        [dict(zip(("difference", "nats per token", "low", "high"), row, strict=True)) for row in rows],
        f"Verdict: **{result['verdict']}**. {result['reason']}\n\n{result['quantized_reason']}.",
    )
    step.say(f"verdict: {result['verdict']}. {result['reason']}")
    step.say(result["quantized_reason"])
    if (few := shortfall(result["documents"], config.evaluate.documents)) is not None:
        step.say(few)
    return {"evaluation": str(folder / "evaluation.json")}


def _show_formats(step: StepRun, rows: Sequence[Mapping[str, Any]]) -> None:
    """The formats side by side: a table, a plot, and a line for each that is not the run's own."""
    config = step.context.config
    if len(rows) == 1:
        return
    plot = plot_formats(rows, config.quantize.max_dnll, step.context.path / "evaluate" / "formats.png")
    for run_id in (step.run_id, step.context.parent_run_id):
        step.tracker.artifact(run_id, plot, "plots")
    table = [{key: value for key, value in row.items() if key != "reason"} for row in rows]
    show_table(
        f"formats-{config.name}", table, f"Quantization formats of {config.name}; {rows[0]['format']} is its own"
    )
    for row in rows[1:]:
        verdict = "would pass" if row["passed"] else "would not pass"
        step.say(f"{row['format']} at {row['bytes_ratio']:.2f} of the bytes {verdict}: {row['reason']}", lasting=True)
