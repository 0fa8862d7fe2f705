"""Rules within the sections of the recipe: decays that bf16 states follow, ranges of profiled steps, LoRA targets."""

from __future__ import annotations

from typing import Any

import pytest

from base.config import Section, validate
from base.errors import ConfigError
from cherry.train_config import LoraConfig, ProfileConfig, TrainConfig


@pytest.mark.parametrize(
    ("section", "values", "problem"),
    [
        (TrainConfig, {"optimizer_state_dtype": "bf16", "beta2": 0.99}, "beta2: must be at most 0.98"),
        (TrainConfig, {"optimizer_state_dtype": "bf16", "beta1": 0.985}, "beta1: must be at most 0.98"),
        (
            TrainConfig,
            {"optimizer": "muon", "optimizer_state_dtype": "bf16", "muon": {"momentum": 0.99}},
            "muon.momentum: must be at most 0.98",
        ),
        (TrainConfig, {"optimizer": "sgd"}, "optimizer: input should be 'adamw' or 'muon'"),
        (TrainConfig, {"muon": {"newton_schulz_steps": 0}}, "muon.newton_schulz_steps: input should be greater than 0"),
        (ProfileConfig, {"steps": [4, 3]}, "steps: must be [first, last] with first <= last (got [4, 3])"),
        (ProfileConfig, {"steps": [1, 2], "ranks": []}, "ranks: must name at least one rank (got [])"),
        (LoraConfig, {"targets": ["router"]}, "targets"),
    ],
)
def test_a_section_that_cannot_be_is_refused_with_its_key(
    section: type[Section], values: dict[str, Any], problem: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        validate(values, section, origin="run.yaml")
    assert problem in str(refused.value)


@pytest.mark.parametrize(
    "values",
    [
        {"optimizer_state_dtype": "bf16", "beta1": 0.98, "beta2": 0.98},
        {"optimizer_state_dtype": "bf16", "muon": {"momentum": 0.99}},  # AdamW has no such momentum
        {"optimizer": "muon", "muon": {"momentum": 0.99}},
    ],
)
def test_decays_at_the_limit_or_of_states_that_are_not_kept_are_allowed(values: dict[str, Any]) -> None:
    assert validate(values, TrainConfig, origin="run.yaml").optimizer_state_dtype in ("fp32", "bf16")
