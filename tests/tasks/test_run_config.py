"""Run configuration: the shipped files, rules over all sections at once, and passwords in any of its URIs."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from base.config import dump, load, validate
from base.errors import ConfigError
from tasks.overrides import resolve
from tasks.run_config import RegisterConfig, RunConfig, TrackingConfig

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "changes",
    [
        {"tracking": {"uri": "https://me:hunter2@mlflow"}},
        {"data": {"source": "s3://AKIA:hunter2@bucket/docs"}},
        {"data": {"tokenizer": "s3://AKIA:hunter2@bucket/tokenizer.json"}},
        {"checkpoint": {"directory": "s3://AKIA:hunter2@bucket"}},
        {"init_from": "s3://AKIA:hunter2@bucket/base"},
    ],
)
def test_a_run_is_not_resolved_with_a_password_in_it(changes: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="must not hold a password") as caught:
        resolve(str(ROOT / "configs" / "tiny.yaml"), changes)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_every_shipped_config_is_a_valid_run_and_survives_a_round_trip(path: Path, tmp_path: Path) -> None:
    config = load(path, RunConfig)
    assert config.model.preset == path.stem
    (tmp_path / "run.yaml").write_text(dump(config))
    assert load(tmp_path / "run.yaml", RunConfig) == config


def test_the_run_configuration_reports_rules_of_every_section_at_once(tmp_path: Path) -> None:
    overrides = ["train.batch_size=15", "launch.nproc_per_node=2", "deploy.traffic_steps_percent=[50]", "train.stpes=9"]
    with pytest.raises(ConfigError) as caught:
        load(ROOT / "configs" / "tiny.yaml", RunConfig, overrides)
    text = str(caught.value)
    assert "tiny.yaml: 3 problems" in text
    assert "train.batch_size: must be divisible by ranks" in text
    assert "deploy.traffic_steps_percent: must be rising percentages" in text
    assert "train.stpes: unknown key, did you mean steps? (got 9)" in text


def test_an_unknown_format_is_refused_with_the_key_and_the_names_there_are(tmp_path):
    with pytest.raises(ConfigError, match=r"quantize\.format: must be one of .*int8, .*, auto \(got 'int3'\)"):
        resolve("configs/tiny.yaml", {"quantize": {"format": "int3"}, "runs_directory": str(tmp_path)})


@pytest.mark.parametrize(
    "uri",
    [
        *("mlruns", "/srv/mlruns", "json:", "json:/srv/runs", "file:///srv/mlruns", "sqlite:///runs/mlflow.db"),
        *("postgresql+psycopg2://host/db", "http://tracking:5000", "databricks", "databricks://profile"),
    ],
)
def test_tracking_uris_of_mlflow_and_of_the_json_tracker(uri: str) -> None:
    assert validate({"uri": uri}, TrackingConfig, origin="run.yaml").uri == uri


def test_a_scheme_that_no_tracker_has_is_refused_before_anything_runs() -> None:
    with pytest.raises(ConfigError, match=r"uri: must be .* schemes json, .*https.* \(got 'jsn:foo'\)"):
        validate({"uri": "jsn:foo"}, TrackingConfig, origin="run.yaml")


def refused(section: str, key: str, value: str) -> bool:
    try:
        resolve("configs/tiny.yaml", {section: {key: value}})
    except ConfigError as error:
        assert f"{section}.{key}" in str(error)
        return True
    return False


@pytest.mark.parametrize("name", ["a/b", "A", "-a", "", "a" * 64])
def test_a_name_of_a_run_is_refused_in_words_without_a_pattern(name: str) -> None:
    with pytest.raises(ConfigError, match=r"name: must be lower-case letters, digits and dashes, at most 63") as caught:
        load(ROOT / "configs" / "tiny.yaml", RunConfig, [f"name={name!r}"])
    assert "^[" not in str(caught.value)


@pytest.mark.parametrize("name", ["ls-1.5b", "a/b", "a:b", "a%b", "it's", 'the "best"', "", " "])
def test_a_model_name_that_the_registry_refuses_is_refused_before_training(name: str) -> None:
    assert refused("register_model", "model_name", name)


@pytest.mark.parametrize("alias", ["latest", "Latest", "v1", "V22", "a b", "a.b", "", "serving"])
def test_an_alias_that_the_registry_refuses_or_has_a_meaning_is_refused_before_training(alias: str) -> None:
    assert refused("register_model", "champion_alias", alias)
    assert refused("register_model", "candidate_alias", alias)


def test_one_alias_cannot_be_both_the_best_and_the_newest() -> None:
    assert refused("register_model", "candidate_alias", "champion")


@settings(max_examples=300, derandomize=True, deadline=None)
@given(st.text("aZ9_-./:%\"' lvVé\x00", max_size=8) | st.sampled_from(["latest", "v1", "x" * 255, "x" * 256]))
def test_what_is_accepted_mlflow_accepts(name: str) -> None:
    from mlflow.utils import validation

    with suppress(ValidationError):
        RegisterConfig(model_name=name)
        validation._validate_model_name(name)
        validation._validate_logged_model_name(name)
    with suppress(ValidationError):
        RegisterConfig(champion_alias=name)
        validation._validate_model_alias_name(name)
        validation._validate_model_alias_name_reserved(name)


@pytest.mark.parametrize("name", ["", "x" * 501])
def test_an_experiment_name_that_mlflow_refuses_is_refused(name: str) -> None:
    assert refused("tracking", "experiment", name)


@pytest.mark.parametrize("format_name", ["int8", "fp8", "nvfp4", "auto"])
def test_a_method_needs_a_format_with_int4_groups(format_name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve("configs/tiny.yaml", {"quantize": {"method": "gptq", "format": format_name}})
    text = (
        f"quantize.method: rounds int4 weights in groups, and the format {format_name} has none: take the format w4a16"
    )
    assert text in str(caught.value)
    assert "(got 'gptq')" in str(caught.value)


def test_a_method_and_its_tokens_are_checked() -> None:
    found = resolve("configs/tiny.yaml", {"quantize": {"method": "awq", "format": "w4a16", "calibration_tokens": 99}})
    assert (found.quantize.method, found.quantize.calibration_tokens) == ("awq", 99)
    assert resolve("configs/tiny.yaml", {}).quantize.method == "nearest"
    assert refused("quantize", "method", "round")
    with pytest.raises(
        ConfigError, match=r"calibration_tokens: must be null with quantize\.method nearest.*\(got 99\)"
    ):
        resolve("configs/tiny.yaml", {"quantize": {"calibration_tokens": 99}})
