"""Triton kernels of the routed experts: a training step against the loop, and gradients that repeat bit for bit."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import model.experts as experts_module
from model.model_config import ModelConfig
from model.transformer import DeepseekV3

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU and finds none"),
]


MakeConfig = Callable[..., ModelConfig]
MakeModel = Callable[..., DeepseekV3]
MakeTokens = Callable[..., Tensor]


# Widths that the grouped matmul takes: multiples of 8 numbers of bf16.
WIDE = {"hidden_size": 128, "moe_intermediate_size": 64, "intermediate_size": 256}


def test_a_bf16_training_step_equals_the_loop_and_repeats_itself(
    make_config: MakeConfig, make_model: MakeModel, make_tokens: MakeTokens, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(**WIDE)
    tokens = make_tokens(config, 4, 64).cuda()

    def step() -> tuple[Tensor, list[Tensor], list[Tensor]]:
        model = make_model(config).to("cuda", torch.bfloat16).train()
        out = model(tokens)
        assert out.mtp_hidden_BTD is not None
        logits = torch.cat([model.logits(out.hidden_BTD), model.logits(out.mtp_hidden_BTD)]).float()
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten().repeat(2)) + out.balance_loss
        grads = torch.autograd.grad(loss, list(model.parameters()))
        return loss, list(grads), [moe.tokens_per_expert_E for moe in model.moe_layers()]

    calls: list[int] = []
    plain = experts_module.grouped_experts

    def counted(*inputs: Tensor) -> Tensor:
        calls.append(1)
        return plain(*inputs)

    monkeypatch.setattr(experts_module, "grouped_experts", counted)
    loss, grads, counts = step()
    assert len(calls) == 3, "the grouped path runs by itself in every mixture layer"
    assert all(grad.isfinite().all() for grad in grads)
    monkeypatch.setattr(experts_module, "can_group", lambda *_: False)
    looped_loss, looped_grads, looped_counts = step()
    assert loss.item() == pytest.approx(looped_loss.item(), rel=1e-2)
    assert torch.equal(counts[0], looped_counts[0]), "before the first mixture layer nothing differs"
    for grad, looped in zip(grads, looped_grads, strict=True):
        # Small differences change a few tokens' experts further up.
        assert (grad.float() - looped.float()).norm() <= 0.3 * looped.float().norm() + 1e-4


def test_experts_gradients_are_the_same_bits_every_time(make_config: MakeConfig, make_model: MakeModel) -> None:
    config = make_config(**WIDE)
    moe = make_model(config).moe_layers()[0].to("cuda", torch.bfloat16)
    x = torch.randn(8, 128, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    runs = [
        torch.autograd.grad(moe(x).hidden_BTD.float().square().sum(), [x, *moe.experts.parameters()]) for _ in range(3)
    ]
    for first, *others in zip(*runs, strict=True):
        assert all(torch.equal(first, other) for other in others)
