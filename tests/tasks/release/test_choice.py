"""Which version a release takes, over a real registry: the run's own or a named one, never one behind unasked."""

import os
import shutil
import time
import warnings

import psutil
import pytest
from prefect.logging import disable_run_logger

from base import storage
from base.errors import ConfigError, MissingFileError
from tasks.overrides import resolve
from tasks.processes.process import is_alive
from tasks.processes.replicas import Server, ServingDirectory
from tasks.register import register
from tasks.release.choice import check_still, choose
from tasks.steps import RunContext, StepRecord, find_finished

pytestmark = pytest.mark.slow


def make_run(runs, name, verdict, compared_with=1, **overrides):
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
        "baseline": f"cherry-tiny v{compared_with}" if compared_with else "untrained",
        "baseline_version": compared_with,
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
            name: make_run(directory, name, verdict, compared_with)
            for name, verdict, compared_with in (
                ("first", "better", None),
                ("second", "can't tell", 1),
                ("third", "worse", 1),
            )
        }


@pytest.fixture(autouse=True)
def no_run_logger():
    with disable_run_logger():
        yield


def test_a_run_releases_what_it_registered_and_not_the_newest_candidate(runs):
    for number, name in enumerate(("first", "second"), start=1):
        found = choose(runs[name], None)
        assert (found.version, found.model_path) == (number, str(runs[name].path / "quantized"))


def test_a_worse_version_is_served_only_when_it_is_named(runs):
    worse = (
        r"version 3 was judged worse than cherry-tiny v1\. --model-version 1 serves the champion, --model-version 3 "
    )
    with pytest.raises(ConfigError, match=worse):
        choose(runs["third"], None)
    assert choose(runs["third"], 3).version == 3
    assert choose(runs["first"], None, "candidate").version == 3


def test_a_run_that_registered_nothing_takes_the_candidate_by_the_same_rule(runs, tmp_path):
    other = RunContext(str(tmp_path / "none"), runs["first"].config)
    with pytest.raises(ConfigError, match="version 3 was judged worse"):
        choose(other, None)
    other.tracker().registry.set_alias("cherry-tiny", "candidate", 2)
    assert choose(other, None).version == 2
    other.tracker().registry.set_alias("cherry-tiny", "candidate", 3)


def test_the_same_number_in_another_registry_is_another_model(runs, tmp_path):
    shutil.copytree(runs["first"].path, tmp_path / "first")
    stranger = make_run(tmp_path, "stranger", "better")
    moved = RunContext(str(tmp_path / "first"), stranger.config)
    assert find_finished(moved.path, "register") is not None
    with pytest.raises(ConfigError, match="is not the one that run stranger registered"):
        choose(moved, None)


def served(context, *labels):
    """Record live replicas with equal shares of the traffic, as releases leave them."""
    serving = ServingDirectory(context.config.runs_directory)
    serving.prepare()
    for label in labels:
        server = Server(label, os.getpid(), psutil.Process().create_time(), "http://127.0.0.1:1", "/weights", label)
        assert is_alive(server.pid, server.created)
        storage.write_json(str(serving.path / f"server-{label}.json"), vars(server))
    serving.write_routes({label: 100.0 / len(labels) for label in labels})


@pytest.fixture
def family(tmp_path):
    """Makes runs of one registry, one after the other."""
    return lambda name, verdict, compared_with: make_run(tmp_path, name, verdict, compared_with)


def test_a_version_behind_the_champion_is_served_only_when_it_is_named(family):
    first, second = family("first", "better", None), family("second", "can't tell", 1)
    newest = family("third", "better", 1)
    assert choose(newest, None).version == 3
    behind = (
        r"the champion is cherry-tiny v3, judged better than cherry-tiny v1: because\. This is version 1, .*"
        r"--model-version 3 serves the champion, --model-version 1 serves this one"
    )
    with pytest.raises(ConfigError, match=behind):
        choose(first, None)
    with pytest.raises(ConfigError, match="version 2, which was compared with cherry-tiny v1"):
        choose(second, None)
    assert choose(first, 1).version == 1


def test_the_champion_is_served_whatever_is_served_now(family):
    first = family("first", "better", None)
    family("second", "worse", 1)
    first.tracker().registry.set_alias("cherry-tiny", "serving", 2)
    served(first, "cherry-tiny-v2")
    release = choose(first, None)
    assert release.version == 1
    assert release.replaces == "cherry-tiny v2, judged worse than cherry-tiny v1: because"
    assert release.story == "cherry-tiny v1, the champion, judged better than untrained: because"


def test_without_a_champion_a_newer_version_that_is_served_is_not_replaced_unasked(family):
    first, second = family("first", "can't tell", None), family("second", "can't tell", None)
    registry = first.tracker().registry
    assert choose(first, None).replaces == ""
    registry.set_alias("cherry-tiny", "serving", 2)
    assert choose(first, None).version == 1, "nothing of it has traffic any more"
    served(first, "cherry-tiny-v2")
    with pytest.raises(
        ConfigError, match=r"cherry-tiny v2, not told apart from untrained: because, is served, and is newer"
    ):
        choose(first, None)
    assert choose(second, None).replaces == ""
    assert choose(first, 1).replaces == "cherry-tiny v2, not told apart from untrained: because"


def test_what_another_model_or_an_unknown_release_serves_is_named_too(family):
    first = family("first", "better", None)
    served(first, "cherry-tiny-v7", "other-v1")
    assert choose(first, None).replaces == "cherry-tiny-v7, other-v1"


def test_a_champion_that_is_made_while_the_replica_starts_is_seen(family):
    first = family("first", "better", None)
    chosen, named = choose(first, None), choose(first, 1)
    check_still(first, chosen)
    family("second", "better", 1)
    with pytest.raises(ConfigError, match=r"the champion is cherry-tiny v2, .*This is version 1"):
        check_still(first, chosen)
    check_still(first, named)


def test_a_version_whose_weights_are_gone_is_told_with_the_way_to_make_them(family):
    first = family("first", "better", None)
    shutil.rmtree(first.path / "quantized")
    with pytest.raises(MissingFileError, match=r"cherry-tiny version 1: its weights are no longer at .*`cherry run`"):
        choose(first, None)
    with pytest.raises(MissingFileError, match="cherry-tiny has no version 9 in the registry at sqlite"):
        choose(first, 9)
