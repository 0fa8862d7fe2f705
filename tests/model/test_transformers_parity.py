"""Logits equal transformers' own DeepSeek-V3 (and V2) on the same weights, through folders that either side wrote."""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from model.model_config import ModelConfig
from model.transformer import DeepseekV3
from model.weights.hf_config import config_from_hf
from model.weights.pretrained import load_pretrained, save_pretrained, state_to_hf

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
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
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


RELEASES: dict[str, Any] = json.loads((Path(__file__).parent / "released_configs.json").read_text())
# Widths and counts of a model of milliseconds; everything else stays as it was released.
SCALED_DOWN: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 48, "intermediate_size": 64, "moe_intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 3, "n_routed_experts": 32, "kv_lora_rank": 16, "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8, "num_nextn_predict_layers": 0, "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip


@pytest.mark.parametrize("release", list(RELEASES))
def test_released_configurations_compute_as_in_transformers(
    release: str, tmp_path: Path, make_model: Callable[..., DeepseekV3], make_tokens: Callable[..., torch.Tensor]
) -> None:
    full = config_from_hf(RELEASES[release])
    ranks = {
        "q_lora_rank": full.q_lora_rank and 24,
        "v_head_dim": 16 * full.v_head_dim // full.qk_nope_head_dim,
        "first_k_dense_replace": 1,
    }
    config = ModelConfig(**{**full.model_dump(), **SCALED_DOWN, **ranks})
    assert difference(make_model(config).eval(), make_tokens(config, 2, 120), tmp_path) < 1e-4


YARN_VALUES = st.fixed_dictionaries(
    {"factor": st.sampled_from([0.5, 1.0, 4.0, 40.0]), "original_max_position_embeddings": st.sampled_from([16, 64])},
    optional={
        "beta_fast": st.sampled_from([1.0, 4.0, 32.0]),
        "beta_slow": st.sampled_from([0.25, 1.0, 2.0]),
        "mscale": st.sampled_from([None, 0.707, 1.0]),
        "mscale_all_dim": st.sampled_from([None, 0.5, 1.0]),
        "attention_factor": st.sampled_from([None, 0.8, 1.3]),
        "truncate": st.booleans(),
    },
)
EXPERTS = st.sampled_from([(1, 1, 1), (1, 1, 4), (2, 1, 3), (4, 2, 3), (4, 4, 5), (8, 3, 2)])


@st.composite
def model_configs(draw: st.DrawFn) -> dict[str, Any]:
    """Keys of a small model's configuration, as config.json and ModelConfig both name them, without rope_scaling."""
    sigmoid = draw(st.booleans())
    groups, kept, chosen = draw(EXPERTS)
    smallest = 2 if sigmoid else 1
    return {
        "vocab_size": 61,
        "hidden_size": draw(st.sampled_from([24, 48])),
        "intermediate_size": draw(st.sampled_from([16, 40])),
        "moe_intermediate_size": draw(st.sampled_from([8, 24])),
        "num_hidden_layers": draw(st.integers(1, 3)),
        "first_k_dense_replace": draw(st.integers(0, 1)),
        "num_attention_heads": draw(st.sampled_from([1, 2, 3])),
        "n_routed_experts": groups * max(smallest, -(-chosen // kept), draw(st.integers(1, 3))),
        "n_shared_experts": draw(st.integers(0, 2)),
        "num_experts_per_tok": chosen,
        "n_group": groups,
        "topk_group": kept,
        "scoring_func": "sigmoid" if sigmoid else "softmax",
        "norm_topk_prob": sigmoid and draw(st.booleans()),
        "routed_scaling_factor": draw(st.sampled_from([0.5, 1.0, 2.5])),
        "q_lora_rank": draw(st.sampled_from([None, 12])),
        "kv_lora_rank": draw(st.sampled_from([8, 20])),
        "qk_nope_head_dim": draw(st.sampled_from([4, 16])),
        "qk_rope_head_dim": draw(st.sampled_from([2, 8, 12])),
        "v_head_dim": draw(st.sampled_from([4, 16, 40])),
        "rms_norm_eps": draw(st.sampled_from([1e-6, 1e-5, 0.1])),
        "rope_theta": draw(st.sampled_from([100.0, 10000.0, 50000.0])),
        "max_position_embeddings": 128,
        "num_nextn_predict_layers": draw(st.integers(0, 1)),
        "bos_token_id": 3,
        "eos_token_id": 4,
    }


several = settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")  # transformers, without shared experts
@several
@given(keys=model_configs(), rope=st.none() | YARN_VALUES)
def test_every_accepted_configuration_is_exported_to_what_transformers_computes(
    keys: dict[str, Any],
    rope: dict[str, Any] | None,
    make_model: Callable[..., DeepseekV3],
    make_tokens: Callable[..., torch.Tensor],
) -> None:
    config = ModelConfig(**keys, rope_scaling=rope)
    with tempfile.TemporaryDirectory() as folder:
        assert difference(make_model(config).eval(), make_tokens(config, 2, 40), Path(folder)) < 1e-4


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")  # transformers, without shared experts
@several
@given(keys=model_configs(), rope=st.none() | YARN_VALUES, old_dialect=st.booleans(), left_out=st.booleans())
def test_folders_that_transformers_wrote_compute_the_same_here(
    keys: dict[str, Any],
    rope: dict[str, Any] | None,
    old_dialect: bool,
    left_out: bool,
    make_tokens: Callable[..., torch.Tensor],
) -> None:
    """`left_out`: the file lacks what equals the default of its class, as files written by older versions do."""
    kind = "V3" if keys.pop("scoring_func") == "sigmoid" else "V2"
    theta = keys.pop("rope_theta")
    keys["num_key_value_heads"] = keys["num_attention_heads"]
    if kind == "V2":
        keys["topk_method"] = "greedy" if keys["n_group"] == 1 else "group_limited_greedy"
        del keys["num_nextn_predict_layers"]
    rope = {"rope_type": "default"} if rope is None else {"rope_type": "yarn", **rope}
    keys["rope_parameters"] = {**rope, "rope_theta": theta}
    theirs = getattr(transformers, f"Deepseek{kind}ForCausalLM")(
        getattr(transformers, f"Deepseek{kind}Config")(**keys)
    ).eval()
    fill(theirs)
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        rewrite(Path(folder) / "config.json", kind, old_dialect=old_dialect, left_out=left_out)
        ours = load_pretrained(folder, dtype=torch.float32)
    tokens = make_tokens(ours.config, 2, 40)
    with torch.no_grad():
        expected = theirs(tokens, use_cache=False).logits
        assert expected.std() > 0.1, "the reference must say something"
        assert float((ours.logits(ours(tokens).hidden_BTD) - expected).abs().max()) < 1e-4


def fill(model: Any) -> None:
    """Weights large enough that a wrong scale or order shows, norms that are not one, biases of both signs."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if value.dim() == 1:
                low, high = (-0.6, 0.3) if name.endswith("correction_bias") else (0.5, 1.5)
                value.uniform_(low, high, generator=generator)
            elif value.numel():
                std = 1.0 if "embed_tokens" in name else 1.5 / value.shape[-1] ** 0.5
                value.normal_(std=std, generator=generator)


def rewrite(path: Path, kind: str, *, old_dialect: bool, left_out: bool) -> None:
    """config.json with transformers 4's rope keys, or without the keys that equal their class's defaults."""
    raw = json.loads(path.read_text())
    if old_dialect:
        rope = raw.pop("rope_parameters")
        raw["rope_theta"] = rope.pop("rope_theta")
        rope["type"] = rope.pop("rope_type")
        raw["rope_scaling"] = None if rope["type"] == "default" else rope
    if left_out:
        plain = getattr(transformers, f"Deepseek{kind}Config")
        raw = {key: value for key, value in raw.items() if not hasattr(plain, key) or getattr(plain, key) != value}
        raw["model_type"] = plain.model_type
    path.write_text(json.dumps(raw))
