"""FSDP units against the model's own parameters and published sizes: elements, trained elements, bytes gathered."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from cherry.lora import add_adapters
from cherry.planner.units import EXPERTS, network_of, whole_network
from cherry.train_config import LoraConfig
from model.model_config import PRESETS, ModelConfig
from model.transformer import DeepseekV3
from tests.cherry.planner.workloads import released


def test_units_hold_every_parameter_of_the_model() -> None:
    for preset in PRESETS.values():
        config = ModelConfig.model_validate(preset)
        biases = config.n_routed_experts * (config.n_moe_layers + config.num_nextn_predict_layers)
        biases = biases if config.scoring_func == "sigmoid" else 0  # buffers, which the published counts include
        network = network_of(released(model=config, shard=1, expert=1))
        assert network.total("elements") + biases == config.parameters(with_mtp=True)
        for expert in (2, 4):
            parallel = network_of(released(model=config, shard=1, expert=expert))
            (own,) = [unit for unit in parallel.mixture.units if unit.name == EXPERTS]
            elsewhere = (expert - 1) * parallel.mixture_layers * own.elements
            assert parallel.total("elements") + elsewhere == network.total("elements")


@pytest.mark.parametrize("targets", [None, ("q_b_proj", "shared_down")])
def test_adapters_alone_are_trained(targets: tuple[str, ...] | None) -> None:
    config, lora = ModelConfig.model_validate(PRESETS["tiny"]), LoraConfig(rank=4, targets=targets)
    with torch.device("meta"):
        model: nn.Module = DeepseekV3(config)
    add_adapters(model, lora)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    network = network_of(released(model=config, shard=1, expert=1, lora=lora))
    assert network.total("trained_elements") == trained
    assert network.total("elements") == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("preset", "experts", "share", "terabytes"),
    [("671b", 653_908_770_816, 0.9745, 1.342), ("16b", 14_394_851_328, 0.9165, 0.0314)],
)
def test_routed_experts_are_most_of_the_weights(preset: str, experts: int, share: float, terabytes: float) -> None:
    model = ModelConfig.model_validate({**PRESETS[preset], "num_nextn_predict_layers": 0})
    network = network_of(released(model=model, shard=1, expert=8))
    unit = next(unit for unit in network.mixture.units if unit.name == EXPERTS)
    assert network.mixture_layers * 8 * unit.elements == experts
    whole = whole_network(model, None).total("elements")
    assert experts / whole == pytest.approx(share, abs=5e-5)
    assert 2 * whole / 1e12 == pytest.approx(terabytes, rel=0.001)


def test_one_mixture_layer_gathered_whole_is_23_gigabytes() -> None:
    network = network_of(released(shard=256, expert=1))
    assert 2 * network.mixture.elements / 1e9 == pytest.approx(23.0, abs=0.05)


@pytest.mark.parametrize(("expert", "terabytes"), [(1, 5.4), (64, 0.22)])
def test_without_expert_parallel_a_step_gathers_and_reduces_terabytes(expert: int, terabytes: float) -> None:
    """Gathered in bf16 for both passes, reduced in fp32."""
    network = network_of(released(shard=256 // expert, expert=expert))
    assert (2 + 2 + 4) * network.total("elements") / 1e12 == pytest.approx(terabytes, abs=0.05)
