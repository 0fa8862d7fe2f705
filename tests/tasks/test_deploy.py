"""Which version a release takes, over a real registry: the run's own or a named one, never a worse one unasked."""

import shutil
import time
import warnings

import pytest
from prefect.logging import disable_run_logger

from base import storage
from base.errors import ConfigError
from tasks.deploy import resolve_version
from tasks.overrides import resolve
from tasks.register import register
from tasks.steps import RunContext, StepRecord, find_finished

pytestmark = pytest.mark.slow


def make_run(runs, name, verdict, **overrides):
    """A run whose register step has really run, over weights and a verdict as earlier steps leave them."""
    config = resolve("configs/tiny.yaml", {"name": name, "runs_directory": str(runs), **overrides})
    context = RunContext(str(runs / name), config)

    def finished(step, output):
        return StepRecord(step, f"{name}-{step}", {step: str(output)}, {}, 1.0, time.time(), None, None)

    for step in ("export", "quantized"):
        storage.commit(str(context.path / step))
    evaluation = context.path / "evaluation.json"
    result = {
        "verdict": verdict,
        "reason": "because",
        "baseline": "cherry-tiny v1",
        "champion_missing": None,
        "quantized_passed": True,
        "quantized_reason": "quantization costs little",
        "bits_per_byte": 2.0,
    }
    storage.write_json(str(evaluation), result)
    steps = {
        "exported": finished("export", context.path / "export"),
        "quantized": finished("quantized", context.path / "quantized"),
        "evaluated": finished("evaluation", evaluation),
    }
    register.fn(context, **steps)
    return context


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Three runs that registered one version each, one after the other; the last is the registry's candidate."""
    directory = tmp_path_factory.mktemp("runs")
    with disable_run_logger(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what MLflow's tables use, which shows when they are first used
        return {
            name: make_run(directory, name, verdict)
            for name, verdict in (("first", "better"), ("second", "can't tell"), ("third", "worse"))
        }


@pytest.fixture(autouse=True)
def no_run_logger():
    with disable_run_logger():
        yield


def test_a_run_releases_what_it_registered_and_not_the_newest_candidate(runs):
    for number, name in enumerate(("first", "second"), start=1):
        found = resolve_version.fn(runs[name], None)
        assert (found.version, found.model_path) == (number, str(runs[name].path / "quantized"))


def test_a_worse_version_is_served_only_when_it_is_named(runs):
    with pytest.raises(ConfigError, match=r"version 3 was judged worse than cherry-tiny v1\..*--model-version 3"):
        resolve_version.fn(runs["third"], None)
    assert resolve_version.fn(runs["third"], 3).version == 3
    assert resolve_version.fn(runs["first"], None, "candidate").version == 3


def test_a_run_that_registered_nothing_takes_the_candidate_by_the_same_rule(runs, tmp_path):
    other = RunContext(str(tmp_path / "none"), runs["first"].config)
    with pytest.raises(ConfigError, match="version 3 was judged worse"):
        resolve_version.fn(other, None)
    other.tracker().set_alias("cherry-tiny", "candidate", 2)
    assert resolve_version.fn(other, None).version == 2
    other.tracker().set_alias("cherry-tiny", "candidate", 3)


def test_the_same_number_in_another_registry_is_another_model(runs, tmp_path):
    shutil.copytree(runs["first"].path, tmp_path / "first")
    stranger = make_run(tmp_path, "stranger", "better")
    moved = RunContext(str(tmp_path / "first"), stranger.config)
    assert find_finished(moved.path, "register") is not None
    with pytest.raises(ConfigError, match="is not the one that run stranger registered"):
        resolve_version.fn(moved, None)
