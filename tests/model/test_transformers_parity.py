"""Logits equal transformers' own DeepSeek-V3 (and V2) on the same weights, through the exported folder."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from model.model_config import ModelConfig
from model.transformer import DeepseekV3
from model.weights.pretrained import save_pretrained, state_to_hf

transformers = pytest.importorskip("transformers")

YARN = {"factor": 4.0, "original_max_position_embeddings": 64}

CASES: dict[str, tuple[dict[str, Any], int]] = {
    "low-rank query, groups": ({}, 33),
    "full query": ({"q_lora_rank": None}, 33),
    "one group": ({"n_group": 1}, 33),
    "two of four groups": ({"n_group": 4, "topk_group": 2, "num_experts_per_tok": 3}, 33),
    "yarn": ({"rope_scaling": YARN}, 40),
    "yarn beyond the original length": ({"rope_scaling": YARN}, 150),
    "yarn, cosine temperature": ({"rope_scaling": {**YARN, "mscale": 0.7}}, 150),
    "yarn, full query, one group": ({"rope_scaling": YARN, "q_lora_rank": None, "n_group": 1}, 90),
    "dense layers only": ({"first_k_dense_replace": 3}, 33),
    "mixture layers only": ({"first_k_dense_replace": 0, "n_shared_experts": 2}, 33),
    "sequence of one": ({"rope_scaling": YARN}, 1),
    "unnormalised weights, scaled": ({"norm_topk_prob": False, "routed_scaling_factor": 2.5}, 33),
    "values as wide as keys": ({"v_head_dim": 24}, 33),
    "values wider than keys": ({"v_head_dim": 32}, 33),
}


def export(model: DeepseekV3, config: ModelConfig, folder: Path) -> None:
    named = (pair for name, tensor in model.state_dict().items() for pair in state_to_hf(name, tensor, config))
    save_pretrained(named, str(folder), config, dtype=torch.float32, max_shard_bytes=100_000)


def difference(model: DeepseekV3, tokens: torch.Tensor, folder: Path) -> float:
    config = model.config
    export(model, config, folder)
    name = "DeepseekV3ForCausalLM" if config.scoring_func == "sigmoid" else "DeepseekV2ForCausalLM"
    theirs = getattr(transformers, name).from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        ours = model.logits(model(tokens).hidden_BTD)
        expected = theirs(tokens, use_cache=False).logits
    assert expected.std() > 0.1, "the reference must say something"
    return float((ours - expected).abs().max())


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers(
    case: str,
    tmp_path: Path,
    make_config: Callable[..., ModelConfig],
    make_model: Callable[..., DeepseekV3],
    make_tokens: Callable[..., torch.Tensor],
) -> None:
    changes, length = CASES[case]
    config = make_config(num_nextn_predict_layers=0, **changes)
    assert difference(make_model(config).eval(), make_tokens(config, 2, length), tmp_path) < 1e-4


def test_an_export_with_an_mtp_module_is_loaded_and_its_main_model_is_the_same(
    tmp_path: Path,
    make_config: Callable[..., ModelConfig],
    make_model: Callable[..., DeepseekV3],
    make_tokens: Callable[..., torch.Tensor],
) -> None:
    """transformers has no MTP: it must leave out that layer, which stands behind the main model's, and no other."""
    config = make_config(num_nextn_predict_layers=1)
    assert difference(make_model(config).eval(), make_tokens(config, 2, 33), tmp_path) < 1e-4
    names = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    assert f"model.layers.{config.num_hidden_layers}.eh_proj.weight" in names


@pytest.mark.parametrize("groups", [(1, 1), (4, 2)])
def test_softmax_logits_equal_transformers_v2(
    groups: tuple[int, int],
    tmp_path: Path,
    make_config: Callable[..., ModelConfig],
    make_model: Callable[..., DeepseekV3],
    make_tokens: Callable[..., torch.Tensor],
) -> None:
    config = make_config(
        scoring_func="softmax",
        norm_topk_prob=False,
        n_group=groups[0],
        topk_group=groups[1],
        rope_scaling={**YARN, "mscale": 0.707, "mscale_all_dim": 0.707},
        num_nextn_predict_layers=0,
    )
    assert difference(make_model(config).eval(), make_tokens(config, 2, 70), tmp_path) < 1e-4
