"""The training flow's parameters, as Prefect's API shows and checks them, and what ends a run from outside."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from prefect.exceptions import ParameterTypeError
from prefect.logging import disable_run_logger
from prefect.utilities.callables import parameter_schema

from base import storage
from flows import train_flow as module
from flows.train_flow import train_flow
from tasks.evaluate import UNTRAINED
from tasks.files.outputs import file_states
from tasks.interruptions.leftovers import teardown
from tasks.interruptions.states import describe
from tasks.lifecycle import TRAIN_STEPS
from tasks.overrides import resolve
from tasks.steps import RunContext, StepRecord, write_record


def test_the_api_offers_a_flow_a_path_and_no_resolved_config() -> None:
    properties = parameter_schema(train_flow).properties
    assert properties["config"]["type"] == "string"
    assert "anyOf" not in properties["config"]


@pytest.mark.parametrize(
    ("overrides", "named"),
    [({"trian": {}}, "trian"), ({"train": {"learning_rte": 0.1}}, "train.learning_rte"), ({"train": 3}, "train")],
)
def test_a_wrong_override_is_refused_by_its_name(overrides: dict[str, Any], named: str) -> None:
    with pytest.raises(ParameterTypeError, match=named):
        train_flow.validate_parameters({"config": "configs/tiny.yaml", "overrides": overrides})


def test_a_flow_that_ends_from_outside_is_torn_down_and_no_flow_is_retried() -> None:
    assert train_flow.on_cancellation_hooks == train_flow.on_crashed_hooks == [teardown, describe]
    assert train_flow.on_failure_hooks == [teardown]
    assert train_flow.retries == 0


# What the steps before the evaluation leave, as far as a summary reads it.
_FILES = {
    "train/result.json": dict.fromkeys(("loss_first", "loss_last", "tokens", "parameters", "tokens_per_second"), 1.0),
    "data/manifest.json": {"source": "s", "documents": 1, "tokens": 1, "bytes": 1, "digest": "d"},
    "quantized/quantization.json": {"bytes_after": 1, "bytes_before": 2},
}
_EVALUATION = {
    **{"verdict": "better", "reason": "its loss is lower.", "champion_missing": None, "quantized_passed": True},
    **{"quantized_reason": "it costs little", "quantized_dnll": 0.0, "bits_per_byte": 1.0, "heldout_loss": 1.0},
    "zlib_bits_per_byte": 2.0,
}


class Rivals:
    """Stand-ins of the steps before `register`: each evaluation finds the candidate better, and is overtaken.

    The loop, the registration, the registry (in files) and the summary are the flow's own.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, overtaken: int) -> None:
        self.compared_with: list[str] = []
        self._overtaken = overtaken
        for name, step in (("prepare_data", "data"), ("export", "export"), ("quantize", "quantize")):
            monkeypatch.setattr(module, name, lambda context, *_, step=step: self._finished(context, step))
        monkeypatch.setattr(module, "provision", lambda context: self._finished(context, "provision"))
        monkeypatch.setattr(
            module.train, "with_options", lambda **_: lambda context, _: self._finished(context, "train")
        )
        monkeypatch.setattr(module, "evaluate", self._evaluate)
        monkeypatch.setattr(module, "register", module.register.fn)

    def _finished(self, context: RunContext, step: str, **outputs: str) -> StepRecord:
        for name, content in _FILES.items():
            storage.write_json(str(context.path / name), content)
        folder = str(context.path / f"{step}-output")
        storage.make_directory(folder)
        storage.commit(folder)
        outputs = outputs or {"export": folder, "quantized": folder}
        identity = storage.fingerprint([step, len(self.compared_with) if step == "evaluate" else 0])
        record = StepRecord(step, identity, outputs, {}, 1.0, time.time(), None, None, files=file_states(outputs))
        write_record(context.path, record)
        return record

    def _evaluate(self, context: RunContext, *_: StepRecord) -> StepRecord:
        champion = registry(context).version("net", alias="champion")
        found = {"baseline": UNTRAINED, "baseline_version": None}
        if champion is not None:
            found = {"baseline": champion.title, "baseline_version": champion.version}
        path = str(context.path / "evaluate" / "evaluation.json")
        storage.write_json(path, _EVALUATION | found)
        self.compared_with.append(str(found["baseline"]))
        if len(self.compared_with) <= self._overtaken:
            rival = f"rival {len(self.compared_with)}"
            made = registry(context).register(None, "net", "/rival", identity=rival, alias="candidate", tags={})
            registry(context).set_alias("net", "champion", made.version)
        return self._finished(context, "evaluate", evaluation=path)


def registry(context: RunContext) -> Any:
    return context.tracker().registry


@pytest.mark.parametrize("overtaken", [0, 5])
def test_a_version_that_is_overtaken_at_every_comparison_ends_as_no_champion_and_says_so(
    overtaken: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    rivals = Rivals(monkeypatch, overtaken)
    (tmp_path / "text.txt").write_text("words")
    values = {"name": "net", "runs_directory": str(tmp_path / "runs"), "tracking": {"uri": "json:"}}
    values |= {"register_model": {"model_name": "net"}, "data": {"source": str(tmp_path / "text.txt")}}
    config = resolve("configs/tiny.yaml", values)
    with disable_run_logger():
        summary = train_flow.fn(config)
    assert summary == storage.read_json(str(tmp_path / "runs" / "net" / "summary.json"))
    assert list(summary["seconds"]) == list(TRAIN_STEPS)
    assert rivals.compared_with == [UNTRAINED, *(f"net v{number}" for number in (1, 3, 4, 5))][: overtaken + 1]
    context = RunContext(str(tmp_path / "runs" / "net"), config)
    champion = registry(context).version("net", alias="champion")
    flow = storage.read_json(str(tmp_path / "runs" / "tracking" / "runs" / f"{summary['run_id']}.json"))
    became = overtaken < 5
    assert (summary["verdict"], summary["champion"]) == ("better", became)
    assert (champion.tags.get("run") == "net") is became
    assert (flow["status"], flow["tags"]["became_champion"]) == ("FINISHED", str(became).lower())
    told = "It did not become the champion: another version became the champion while this one was compared with net v5"
    assert (told in flow["note"]) is not became
    assert (summary["champion_reason"] is None) is became
