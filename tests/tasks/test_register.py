"""The register step: a version by reference with its aliases, and the same version again for the same inputs."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from prefect.logging import disable_run_logger

from base import storage
from tasks.evaluate import UNTRAINED
from tasks.overrides import resolve
from tasks.register import register
from tasks.steps import RunContext, StepRecord


@pytest.fixture(autouse=True)
def no_run_logger() -> Iterator[None]:
    with disable_run_logger():
        yield


def registered(runs: Path, name: str, verdict: str, baseline: str = "net v1") -> tuple[RunContext, StepRecord]:
    """The register step of a run, over what earlier steps leave."""
    overrides = {"name": name, "runs_directory": str(runs), "tracking": {"uri": f"json:{runs}/tracking"}}
    overrides |= {"register_model": {"model_name": "net"}}
    context = RunContext(str(runs / name), resolve("configs/tiny.yaml", overrides))
    result = {
        "verdict": verdict,
        "reason": "because",
        "baseline": baseline,
        "champion_missing": None,
        "quantized_passed": True,
        "quantized_reason": "quantization costs little",
        "bits_per_byte": 2.34567,
    }
    storage.write_json(str(context.path / "evaluation.json"), result)
    steps = {
        step: StepRecord(step, f"{name}-{step}", {key: str(context.path / place)}, {}, 1.0, time.time(), None, None)
        for step, key, place in (
            ("export", "export", "export"),
            ("quantize", "quantized", "quantized"),
            ("evaluate", "evaluation", "evaluation.json"),
        )
    }
    return context, register.fn(context, steps["export"], steps["quantize"], steps["evaluate"])


def aliases(context: RunContext) -> dict[str, int | None]:
    registry = context.tracker().registry
    found = {alias: registry.version("net", alias=alias) for alias in ("candidate", "champion")}
    return {alias: version and version.version for alias, version in found.items()}


def test_every_version_is_the_candidate_and_a_better_one_the_champion(tmp_path: Path) -> None:
    context, record = registered(tmp_path, "first", "better", UNTRAINED)
    assert aliases(context) == {"candidate": 1, "champion": 1}
    events = [json.loads(line) for line in (context.path / "events.jsonl").read_text().splitlines()]
    assert any("no champion to beat but the untrained model" in event.get("line", "") for event in events)
    written = storage.read_json(record.outputs["register"])
    assert (written["name"], written["version"], written["champion"]) == ("net", 1, True)
    for number, verdict in ((2, "can't tell"), (3, "worse")):
        context, _ = registered(tmp_path, verdict.replace("'", "").replace(" ", "-"), verdict)
        assert aliases(context) == {"candidate": number, "champion": 1}


def test_weights_are_registered_by_reference_with_what_was_found_of_them(tmp_path: Path) -> None:
    context, _ = registered(tmp_path, "first", "better")
    version = context.tracker().registry.version("net", number=1)
    assert version is not None
    assert version.uri == str(tmp_path / "first" / "export")
    wanted = {
        "run": "first",
        "quantized_uri": str(tmp_path / "first" / "quantized"),
        "export_fingerprint": "first-export",
        "verdict": "better",
        "compared_with": "net v1",
        "quantized_passed": "true",
        "heldout_bits_per_byte": "2.3457",
    }
    assert wanted.items() <= version.tags.items()
    assert json.loads(version.tags["config"])["name"] == "first"


def test_the_same_inputs_register_no_second_version(tmp_path: Path) -> None:
    context, first = registered(tmp_path, "first", "better")
    _, again = registered(tmp_path, "first", "better")
    assert (first.reused, again.reused) == (False, True)
    (context.path / "steps" / "register.json").unlink()  # as if the process had ended before the record was written
    _, repeated = registered(tmp_path, "first", "better")
    assert not repeated.reused
    assert context.tracker().registry.version("net", number=2) is None
