"""Adapters: nothing changes at first, only they are trained, and merged they are the same model."""

from __future__ import annotations

import pytest
import torch

from base.config import validate
from base.errors import ConfigError
from cherry.job_config import JobConfig
from cherry.lora import LoraLinear, add_adapters, initialize_adapters, merged
from cherry.train_config import LoraConfig
from model.model_config import ModelConfig
from model.transformer import DeepseekV3

SMALL = {
    "preset": "tiny",
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "moe_intermediate_size": 16,
    "intermediate_size": 48,
}
TOKENS = torch.randint(97, (2, 12), generator=torch.Generator().manual_seed(0))


def adapted(config: LoraConfig, **changes: object) -> tuple[DeepseekV3, DeepseekV3]:
    """A plain model, and one with the same weights and adapters."""
    architecture = ModelConfig(**{**SMALL, **changes})  # type: ignore[arg-type]
    plain, model = DeepseekV3(architecture), DeepseekV3(architecture)
    add_adapters(model, config)
    plain.init_weights(0)
    model.init_weights(0)
    initialize_adapters(model, 0)
    return plain.eval(), model.eval()


def adapter_names(model: DeepseekV3) -> set[str]:
    return {name.rpartition(".")[0] for name, _ in model.named_parameters() if "lora_" in name}


def test_fresh_adapters_change_nothing_and_leave_every_name_and_seed_as_it_was() -> None:
    plain, model = adapted(LoraConfig(rank=4))
    assert torch.equal(model(TOKENS).hidden_BTD, plain(TOKENS).hidden_BTD)
    state = model.state_dict()
    for name, value in plain.state_dict().items():
        assert torch.equal(state[name], value), name
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained
    assert all(name.endswith((".lora_A_RD", ".lora_B_FR")) for name in trained)
    a_RD = model.layers[0].self_attn.q_b_proj.lora_A_RD
    assert float(a_RD.detach().std()) == pytest.approx((3 * a_RD.shape[1]) ** -0.5, rel=0.2)


@pytest.mark.parametrize("low_rank_query", [True, False])
def test_merged_weights_are_the_adapted_model(low_rank_query: bool) -> None:
    config = LoraConfig(rank=4, alpha=6.0)
    plain, model = adapted(config, q_lora_rank=24 if low_rank_query else None)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B_FR"):
                parameter.normal_(std=0.5, generator=torch.Generator().manual_seed(len(name)))
    expected = model(TOKENS).hidden_BTD
    assert not torch.allclose(expected, plain(TOKENS).hidden_BTD, atol=1e-2)
    state = dict(merged(model.state_dict().items(), config))
    assert state.keys() == plain.state_dict().keys()
    plain.load_state_dict(state)
    torch.testing.assert_close(plain(TOKENS).hidden_BTD, expected, rtol=1e-4, atol=1e-5)


def test_targets_choose_the_projections() -> None:
    _, everything = adapted(LoraConfig())
    attention = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
    blocks = ("layers.0", "layers.1", "mtp.block")
    expected = {f"{block}.self_attn.{name}" for block in blocks for name in attention}
    shared = {f"{b}.mlp.shared_experts.{n}" for b in blocks[1:] for n in ("gate_up_proj", "down_proj")}
    assert adapter_names(everything) == expected | shared
    _, some = adapted(LoraConfig(targets=("kv_b_proj", "shared_down")))
    chosen = {f"{block}.self_attn.kv_b_proj" for block in blocks}
    assert adapter_names(some) == chosen | {f"{block}.mlp.shared_experts.down_proj" for block in blocks[1:]}


def test_dropout_is_of_the_adapter_alone_and_off_in_evaluation() -> None:
    layer = LoraLinear(64, 8, LoraConfig(rank=2, dropout=0.5))
    torch.nn.init.normal_(layer.lora_A_RD)
    torch.nn.init.zeros_(layer.lora_B_FR)
    x = torch.randn(3, 64)
    assert torch.equal(layer.train()(x), x @ layer.weight.T)
    torch.nn.init.normal_(layer.lora_B_FR)
    assert not torch.equal(layer(x), layer(x))
    assert torch.equal(layer.eval()(x), layer(x))


def test_what_cannot_be_adapted_is_refused_with_its_key() -> None:
    def problems(lora: dict[str, object], **model: object) -> str:
        raw = {"name": "x", "model": {"preset": "tiny", **model}, "lora": lora}
        with pytest.raises(ConfigError) as caught:
            validate(raw, JobConfig, origin="test")
        return str(caught.value)

    assert "init_from: is required with lora" in problems({})
    assert "lora.targets: must be projections of the model, which has no q_proj" in problems({"targets": ["q_proj"]})
    told = problems({"targets": ["shared_down"]}, n_shared_experts=0)
    assert "lora.targets: must be projections of the model, which has no shared_down" in told
    assert "lora.targets: must name at least one" in problems({"targets": []})
    assert "lora.targets.0" in problems({"targets": ["gate"]})
