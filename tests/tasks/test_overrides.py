"""Typed parameters: refused early when misspelt, merged over the file when right."""

import pytest
from pydantic import ValidationError

from base.config import dump
from base.errors import ConfigError
from tasks.overrides import Overrides, overrides_from, resolve, run_directory, write_resolved


def test_a_misspelt_key_is_refused_at_any_depth():
    for wrong in ({"trian": {}}, {"train": {"learnin_rate": 1.0}}, {"serve": {"engine": {"block": 1}}}):
        with pytest.raises(ValidationError, match="Extra inputs are not permitted"):
            Overrides.model_validate(wrong)


def test_the_schema_that_prefect_checks_forbids_unknown_keys_everywhere():
    schema = Overrides.model_json_schema()
    sections = [schema, *schema["$defs"].values()]
    assert len(sections) > 10
    assert all(section["additionalProperties"] is False for section in sections if section["type"] == "object")


def test_keys_are_described_in_the_schema_as_they_are_in_the_code():
    found = Overrides.model_json_schema()["$defs"]
    margin = found["EvaluateConfigOverrides"]["properties"]["margin_nats"]
    assert margin["description"].startswith("A difference below this")
    assert "default" not in margin
    described = [
        one for section in found.values() for one in section.get("properties", {}).values() if "description" in one
    ]
    assert len(described) > 30


def test_arguments_become_nested_overrides_with_only_what_was_given():
    overrides = overrides_from(["train.learning_rate=2e-6", "deploy.traffic_steps_percent=[5, 100]", "name=mine"])
    given = {"train": {"learning_rate": 2e-6}, "deploy": {"traffic_steps_percent": [5, 100]}, "name": "mine"}
    assert overrides.model_dump(mode="json", exclude_unset=True) == given


def test_an_argument_that_is_no_pair_or_no_key_is_told():
    with pytest.raises(ConfigError, match="must read dotted"):
        overrides_from(["train.steps"])
    with pytest.raises(ConfigError, match=r"train\.stpes"):
        overrides_from(["train.stpes=3"])


def test_overrides_win_over_the_file_and_leave_the_rest():
    config = resolve("configs/tiny.yaml", overrides_from(["train.steps=77", "data.sequence_length=64"]))
    plain = resolve("configs/tiny.yaml", {})
    assert (config.train.steps, config.data.sequence_length) == (77, 64)
    assert config.train.learning_rate == plain.train.learning_rate
    assert config.model == plain.model


def test_a_combination_that_cannot_work_is_told_with_its_key(tmp_path):
    with pytest.raises(ConfigError, match=r"train\.batch_size: must be divisible"):
        resolve("configs/tiny.yaml", {"train": {"batch_size": 7, "gradient_accumulation_steps": 2}})


def test_the_resolved_file_reads_back_to_the_same_config(tmp_path):
    config = resolve("configs/tiny.yaml", {"name": "mine", "runs_directory": str(tmp_path)})
    directory = write_resolved(config)
    assert directory == str(tmp_path / "mine")
    assert resolve(f"{directory}/config.yaml", {}) == config
    assert (tmp_path / "mine" / "config.yaml").read_text() == dump(config)


def test_a_run_directory_must_be_local():
    with pytest.raises(ConfigError, match="runs_directory: must be a local"):
        run_directory(resolve("configs/tiny.yaml", {"runs_directory": "s3://bucket/runs"}))
