"""Weights that do not fit: a few lines of each kind, the count, and the likely cause."""

from __future__ import annotations

import pytest

from base.errors import WeightsError
from model.model_config import PRESETS, ModelConfig
from model.weights.misfit import Misfit

CONFIG = ModelConfig(**PRESETS["tiny"])  # four layers and the MTP layer


def text_of(misfit: Misfit, names: list[str]) -> str:
    with pytest.raises(WeightsError) as caught:
        misfit.raise_if_any("there", names, CONFIG)
    return str(caught.value)


def test_weights_that_fit_raise_nothing() -> None:
    Misfit().raise_if_any("there", ["model.norm.weight"], CONFIG)


def test_hundreds_of_problems_are_a_few_lines_of_each_kind_and_their_number() -> None:
    missing = {f"model.layers.2.mlp.experts.{expert}.up_proj.weight": (96, 128) for expert in range(800)}
    misfit = Misfit(missing, {"wrong shape of lm_head.weight": None}, {"a": (3,), "b": None})
    lines = text_of(misfit, ["a", "b", "lm_head.weight"]).splitlines()
    assert lines[0].startswith("there does not fit the model: 803 problems.")
    assert lines[1] == "  missing model.layers.2.mlp.experts.0.up_proj.weight (shape [96, 128])"
    assert "  and 792 more missing" in lines
    assert lines[-3:] == ["  wrong shape of lm_head.weight", "  unexpected a (shape [3])", "  unexpected b"]
    assert len(lines) == 13


@pytest.mark.parametrize(
    ("missing", "names", "cause"),
    [
        (["model.layers.4.enorm.weight"], ["model.norm.weight"], "set model.num_nextn_predict_layers to 0"),
        (["model.layers.4.enorm.weight"], ["model.layers.4.hnorm.weight"], "belong together"),
        (["model.norm.weight"], ["module.model.norm.weight"], "begin with 'module.'"),
        (["model.norm.weight"], ["language_model.model.norm.weight"], "begin with 'language_model.'"),
        (["model.norm.weight"], ["model._orig_mod.norm.weight"], "`_orig_mod.`"),
        (["lm_head.weight"], ["lm_head.qweight"], "quantized in a format"),
        (["model.norm.weight"], ["layers.0.attn.wq_a.weight"], "No tensor has a released name"),
    ],
)
def test_the_likely_cause_is_named(missing: list[str], names: list[str], cause: str) -> None:
    unexpected = {name: (1,) for name in names if not name.startswith(("model.norm", "model.layers"))}
    assert cause in text_of(Misfit(dict.fromkeys(missing, (1,)), {}, unexpected), names)
