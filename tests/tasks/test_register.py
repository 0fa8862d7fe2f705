"""The register step: a version by reference with its aliases, and the same version again for the same inputs."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from prefect.logging import disable_run_logger

from base import storage
from tasks.evaluate import UNTRAINED
from tasks.overrides import resolve
from tasks.register import is_outdated, register
from tasks.steps import RunContext, StepRecord


@pytest.fixture(autouse=True)
def no_run_logger() -> Iterator[None]:
    with disable_run_logger():
        yield


def registered(
    runs: Path, name: str, verdict: str, baseline: str = "net v1", **made: str
) -> tuple[RunContext, StepRecord]:
    """The register step of a run, over what earlier steps leave; `made` are fingerprints of steps."""
    overrides = {"name": name, "runs_directory": str(runs), "tracking": {"uri": f"json:{runs}/tracking"}}
    overrides |= {"register_model": {"model_name": "net"}}
    context = RunContext(str(runs / name), resolve("configs/tiny.yaml", overrides))
    result = {
        "verdict": verdict,
        "reason": "because",
        "baseline": baseline,
        "baseline_version": None if baseline == UNTRAINED else int(baseline.removeprefix("net v")),
        "champion_missing": None,
        "quantized_passed": True,
        "quantized_reason": "quantization costs little",
        "bits_per_byte": 2.34567,
    }
    storage.write_json(str(context.path / "evaluation.json"), result)
    fingerprints = {"evaluate": f"{name}-evaluate-{baseline}", **made}
    steps = {
        step: StepRecord(
            step,
            fingerprints.get(step, f"{name}-{step}"),
            {key: str(context.path / place)},
            {},
            1.0,
            time.time(),
            None,
            None,
        )
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
    assert written["champion_reason"] is None
    for number, verdict in ((2, "can't tell"), (3, "worse")):
        context, record = registered(tmp_path, verdict.replace("'", "").replace(" ", "-"), verdict)
        assert aliases(context) == {"candidate": number, "champion": 1}
        written = storage.read_json(record.outputs["register"])
        assert (written["champion"], written["champion_reason"]) == (False, "it was not found better than net v1")


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
    assert version.tags["reason"] == "because"


def test_the_registry_tells_a_versions_story(tmp_path: Path) -> None:
    context, _ = registered(tmp_path, "first", "better")
    stored = storage.read_json(str(tmp_path / "tracking" / "models" / "net.json"))
    card = stored["versions"][0]["description"]
    assert card.startswith("Because.\n")
    for told in ("**better** (compared with net v1)", "2.3457 bits per byte", "quantization costs little", "licence"):
        assert told in card
    assert f"cherry deploy {context.path}/config.yaml --model-version 1" in card
    assert "`champion` is the best version" in stored["description"]


def test_the_same_inputs_register_no_second_version(tmp_path: Path) -> None:
    context, first = registered(tmp_path, "first", "better", UNTRAINED)
    _, again = registered(tmp_path, "first", "better", UNTRAINED)
    assert (first.reused, again.reused) == (False, True)
    (context.path / "steps" / "register.json").unlink()  # as if the process had ended before the record was written
    _, repeated = registered(tmp_path, "first", "better", UNTRAINED)
    assert not repeated.reused
    assert context.tracker().registry.version("net", number=2) is None


def test_a_moved_run_is_the_same_version_at_its_new_place(tmp_path: Path) -> None:
    registered(tmp_path / "runs", "first", "better", UNTRAINED)
    (tmp_path / "runs").rename(tmp_path / "moved")
    context, record = registered(tmp_path / "moved", "first", "better", UNTRAINED)
    assert not record.reused
    version = context.tracker().registry.version("net", alias="champion")
    assert version is not None
    assert (version.version, version.uri) == (1, str(tmp_path / "moved" / "first" / "export"))


def test_better_than_a_champion_that_was_replaced_meanwhile_is_no_champion(tmp_path: Path) -> None:
    _, first = registered(tmp_path, "first", "better", UNTRAINED)
    # Both were compared with v1, and the other one has ended first.
    _, second = registered(tmp_path, "second", "better", "net v1")
    context, third = registered(tmp_path, "third", "better", "net v1")
    assert aliases(context) == {"candidate": 3, "champion": 2}
    assert [is_outdated(record) for record in (first, second, third)] == [False, False, True]
    written = storage.read_json(third.outputs["register"])
    assert written["champion"] is False
    assert "another version became the champion while this one was compared with net v1" in written["champion_reason"]
    told = [context.tracker().registry.version("net", number=number) for number in (1, 2, 3)]
    assert [one and one.tags["became_champion"] for one in told] == ["true", "true", "false"]
    # Compared again, with the champion of this moment.
    context, again = registered(tmp_path, "third", "better", "net v2")
    assert aliases(context)["champion"] == 3
    assert not is_outdated(again)
    context, late = registered(tmp_path, "late", "better", UNTRAINED)
    assert is_outdated(late)


def test_weights_that_are_quantized_anew_take_the_place_of_the_same_champion(tmp_path: Path) -> None:
    registered(tmp_path, "first", "better", UNTRAINED)
    # Its evaluation passes over the champion, which is itself.
    context, again = registered(tmp_path, "first", "better", UNTRAINED, quantize="int8", evaluate="int8")
    assert aliases(context) == {"candidate": 2, "champion": 2}
    assert not is_outdated(again)


def test_a_run_that_did_not_replace_the_champion_tries_again_when_it_is_started_again(tmp_path: Path) -> None:
    registered(tmp_path, "first", "better", UNTRAINED)
    context, _ = registered(tmp_path, "second", "better", "net v1")
    _, late = registered(tmp_path, "late", "better", "net v1")
    assert is_outdated(late)
    context.tracker().registry.set_alias("net", "champion", 1)  # a person takes the second one back
    _, again = registered(tmp_path, "late", "better", "net v1")
    assert not again.reused
    assert aliases(context)["champion"] == 3
    _, found = registered(tmp_path, "late", "better", "net v1")
    assert found.reused


def test_a_version_that_the_registry_has_lost_is_registered_again(tmp_path: Path) -> None:
    context, _ = registered(tmp_path, "first", "better", UNTRAINED)
    shutil.rmtree(tmp_path / "tracking")  # as where mlflow.db was deleted
    _, again = registered(tmp_path, "first", "better", UNTRAINED)
    assert not again.reused
    assert aliases(context) == {"candidate": 1, "champion": 1}
    _, found = registered(tmp_path, "first", "better", UNTRAINED)
    assert found.reused
    shutil.rmtree(tmp_path / "tracking")
    registered(tmp_path, "other", "better", UNTRAINED)  # another run's version has the number now
    _, once_more = registered(tmp_path, "first", "better", UNTRAINED)
    assert not once_more.reused
    version = context.tracker().registry.version("net", number=2)
    assert version is not None and version.tags["run"] == "first"
