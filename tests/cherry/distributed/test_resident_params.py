"""Resident parameters on a mesh of one: the same losses and parameters as FSDP2's own way, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from cherry.distributed import fsdp
from cherry.distributed.fsdp_hooks import Communication
from cherry.distributed.mesh import build_meshes
from cherry.job_config import CommunicationConfig, ParallelConfig
from cherry.optim import adamw
from cherry.optim.build import build_optimizer
from cherry.train_config import TrainConfig
from cherry.training_model import Network, TrainingModel
from model.fp8.linear import use_fp8
from model.model_config import ModelConfig
from model.transformer import DeepseekV3

SMALL = {"preset": "tiny", "vocab_size": 128, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
STEPS, MICRO_BATCHES = 3, 2


@pytest.fixture
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


# Wide enough for fp8's blocks.
WIDE = {**SMALL, "hidden_size": 128, "moe_intermediate_size": 128}


def build(*, resident: bool, micro_batches: int, fp8: bool = False, optimizer: str = "adamw") -> Network:
    options = {"optimizer": optimizer, "learning_rate": 2e-3, "gradient_accumulation_steps": micro_batches}
    train = TrainConfig.model_validate(options)
    with torch.device("meta"):
        model = DeepseekV3(ModelConfig.model_validate(WIDE if fp8 else SMALL))
    module = TrainingModel(model, 64)
    if fp8:
        assert use_fp8(model)
    meshes = build_meshes(ParallelConfig(), torch.device("cpu"))
    fsdp.shard_model(module, meshes, "bf16", ParallelConfig())
    module.to_empty(device="cpu")
    fsdp.initialize(model, seed=0)
    network = Network(model, module.train(), build_optimizer(model, train), micro_batches if resident else None, fp8)
    network.start(Communication(network.module, CommunicationConfig()))
    return network


def train(network: Network, tokens: Tensor, *, reshard_at: int | None = None) -> list[float]:
    losses = []
    for number, batches in enumerate(tokens):
        if number == reshard_at:
            network.reshard()
        total = 0.0
        for batch in batches:
            loss, mtp_loss, balance = network.module(batch[:, :-1].contiguous(), batch[:, 1:].contiguous())
            (loss / 64 + 0.3 * mtp_loss / 64 + 1e-4 * balance).backward()
            total += loss.item()
        network.step(network.gradient_norm(), 1.0)
        network.zero_grad()
        losses.append(total)
    network.reshard()
    return losses


@pytest.mark.parametrize(
    ("micro_batches", "fp8", "optimizer"),
    [
        (1, False, "adamw"),
        (MICRO_BATCHES, False, "adamw"),
        (1, True, "adamw"),
        (MICRO_BATCHES, False, "muon"),
        (1, True, "muon"),
    ],
)
def test_residency_changes_nothing(
    one_rank: None, micro_batches: int, fp8: bool, optimizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adamw, "_step_fused", adamw.step_reference)  # one arithmetic on both sides
    one_step = torch.randint(128, (1, micro_batches, 2, 33), generator=torch.Generator().manual_seed(0))
    tokens = one_step.expand(STEPS, -1, -1, -1)
    plain, kept = (
        build(resident=resident, micro_batches=micro_batches, fp8=fp8, optimizer=optimizer)
        for resident in (False, True)
    )
    assert kept.resident is not None and plain.resident is None and bool(kept.resident.quantized) == fp8
    expected = train(plain, tokens)
    assert expected[-1] < expected[0]
    # Resharding, as a checkpoint does, leaves no trace.
    assert train(kept, tokens, reshard_at=1) == expected
    for (name, one), other in zip(plain.model.named_parameters(), kept.model.parameters(), strict=True):
        assert torch.equal(one.to_local(), other.to_local()), name  # type: ignore[attr-defined]


def test_quantized_weights_follow_parameters_that_were_restored(one_rank: None) -> None:
    tokens = torch.randint(128, (STEPS, 1, 2, 33), generator=torch.Generator().manual_seed(0))
    network = build(resident=True, micro_batches=1, fp8=True)
    network.reshard()
    first = [parameter.to_local().clone() for parameter in network.model.parameters()]  # type: ignore[attr-defined]
    losses = train(network, tokens)
    with torch.no_grad():
        for parameter, value in zip(network.model.parameters(), first, strict=True):
            parameter.to_local().copy_(value)  # type: ignore[attr-defined]
    network.start(Communication(network.module, CommunicationConfig()))
    batch = tokens[0, 0]
    again, _, _ = network.module(batch[:, :-1].contiguous(), batch[:, 1:].contiguous())
    assert again.item() == losses[0]


def test_gradients_of_micro_batches_are_summed_in_fp32(one_rank: None) -> None:
    network = build(resident=True, micro_batches=MICRO_BATCHES)
    assert network.resident is not None
    tokens = torch.randint(128, (MICRO_BATCHES, 2, 33), generator=torch.Generator().manual_seed(0))
    parts: list[Tensor] = []
    head = network.model.lm_head.weight
    parameter = next(p for p, resident in network.resident.resident.items() if resident is head)
    for batch in tokens:
        loss, _, _ = network.module(batch[:, :-1].contiguous(), batch[:, 1:].contiguous())
        (loss / 64).backward()
        gradient = network.resident.gradient(parameter)
        assert gradient is not None and gradient.dtype == torch.float32
        parts.append(gradient.clone())
    assert head.dtype == torch.bfloat16 and head.grad is None
    single = parts[1] - parts[0]
    torch.testing.assert_close(single, single.bfloat16().float(), rtol=1e-2, atol=1e-6)
    network.zero_grad()
    assert network.resident.gradient(parameter) is None


def test_parameters_that_got_other_memory_are_stepped_after_resharding(one_rank: None) -> None:
    """As FSDP2 does with uneven shards when a state is loaded."""
    tokens = torch.randint(128, (1, 1, 2, 33), generator=torch.Generator().manual_seed(0))
    network = build(resident=False, micro_batches=1)
    train(network, tokens)  # reshards at its end
    head = network.model.lm_head.weight
    head._local_tensor = head._local_tensor.clone()  # type: ignore[attr-defined,operator]
    before = head._local_tensor.detach().clone()  # type: ignore[operator]
    network.optimizer.zero_grad()
    for parameter in network.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    network.step(network.gradient_norm(), 1.0)
    assert not torch.equal(head._local_tensor, before)  # type: ignore[arg-type]
