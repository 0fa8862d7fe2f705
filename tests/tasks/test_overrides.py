"""Typed parameters: refused early when misspelt, merged over the file when right."""

from datetime import date

import pytest
from pydantic import ValidationError

from base.config import dump, load
from base.errors import ConfigError
from tasks.overrides import Overrides, dated, resolve, run_directory, write_resolved
from tasks.run_config import RunConfig


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
    assert margin["description"].startswith("Differences below this")
    assert "default" not in margin
    described = [
        one for section in found.values() for one in section.get("properties", {}).values() if "description" in one
    ]
    assert len(described) > 30


def test_the_api_keeps_only_keys_that_were_given():
    given = {"train": {"learning_rate": 2e-6}, "deploy": {"traffic_steps_percent": [5, 100]}, "name": "mine"}
    assert Overrides.model_validate(given).model_dump(mode="json") == given


def test_overrides_win_over_the_file_and_leave_the_rest():
    overrides = Overrides.model_validate({"train": {"steps": 77}, "data": {"sequence_length": 64}})
    config = resolve("configs/tiny.yaml", overrides)
    plain = resolve("configs/tiny.yaml")
    assert (config.train.steps, config.data.sequence_length) == (77, 64)
    assert config.train.learning_rate == plain.train.learning_rate
    assert config.model == plain.model


@pytest.mark.parametrize(
    ("words", "nested"),
    [
        (["train.steps=77", "data.sequence_length=64"], {"train": {"steps": 77}, "data": {"sequence_length": 64}}),
        (["train={steps: 77}"], {"train": {"steps": 77}}),
        (["lora.rank=4", "init_from=base"], {"lora": {"rank": 4}, "init_from": "base"}),
        (["train.spike_sigma=null"], {"train": {"spike_sigma": None}}),
        (
            ["communication.environment.NCCL_DEBUG=INFO"],
            {"communication": {"environment": {"NCCL_DEBUG": "INFO"}}},
        ),
    ],
)
def test_the_command_line_and_a_deployment_resolve_the_same_overrides_to_the_same_config(words, nested):
    by_api = resolve("configs/tiny.yaml", Overrides.model_validate(nested))
    assert load("configs/tiny.yaml", RunConfig, words) == by_api == resolve("configs/tiny.yaml", nested)


def test_a_resolved_config_is_taken_as_it_is_and_as_the_api_keeps_it():
    config = resolve("configs/tiny.yaml", {"name": "mine"})
    assert resolve(config) is config
    assert resolve(config.model_dump(mode="json")) == config
    assert resolve(config, {"train": {"steps": 77}}).train.steps == 77


def test_the_day_is_added_to_the_name():
    config = resolve("configs/tiny.yaml")
    assert dated(config, date(2026, 3, 9)) == resolve("configs/tiny.yaml", {"name": "tiny-20260309"})
    with pytest.raises(ConfigError, match="name: "):
        dated(resolve("configs/tiny.yaml", {"name": "n" * 60}), date(2026, 3, 9))


def test_an_impossible_combination_is_refused_with_its_key(tmp_path):
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
