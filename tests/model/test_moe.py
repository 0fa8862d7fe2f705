"""The mixture of experts against a loop over tokens, and its router's traps."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model.model_config import ModelConfig
from model.moe import MoE, route, sequence_balance_loss
from model.transformer import DeepseekV3

MakeConfig = Callable[..., ModelConfig]


def layer(config: ModelConfig, bias: list[float] | None = None) -> MoE:
    torch.manual_seed(0)
    moe = MoE(config)
    with torch.no_grad():
        for parameter in moe.parameters():
            parameter.normal_(std=parameter.shape[-1] ** -0.5)
        if bias is not None:
            assert moe.e_score_correction_bias_E is not None
            moe.e_score_correction_bias_E.copy_(torch.tensor(bias))
    return moe


def chosen_by_hand(score: list[float], bias: list[float], config: ModelConfig) -> list[int]:
    """noaux_tc in plain Python."""
    biased = [s + b for s, b in zip(score, bias, strict=True)]
    per_group = config.n_routed_experts // config.n_group
    groups = [list(range(g * per_group, (g + 1) * per_group)) for g in range(config.n_group)]
    best = 2 if config.scoring_func == "sigmoid" else 1
    ranked = sorted(groups, key=lambda group: -sum(sorted((biased[e] for e in group), reverse=True)[:best]))
    allowed = [expert for group in ranked[: config.topk_group] for expert in group]
    return sorted(allowed, key=lambda expert: -biased[expert])[: config.num_experts_per_tok]


def naive(moe: MoE, x_BTD: Tensor) -> tuple[Tensor, list[list[int]]]:
    """One token and one expert at a time."""
    config, rows, choices = moe.config, [], []
    bias = moe.e_score_correction_bias_E
    for x_D in x_BTD.flatten(0, 1):
        logits = moe.gate.weight @ x_D
        score = logits.sigmoid() if config.scoring_func == "sigmoid" else logits.softmax(-1)
        biases = [0.0] * config.n_routed_experts if bias is None else bias.tolist()
        chosen = chosen_by_hand(score.tolist(), biases, config)
        total = sum(score[e] for e in chosen) if config.norm_topk_prob else 1.0
        out = torch.zeros_like(x_D)
        for expert in chosen:
            gate, up = (moe.experts.w13_EFD[expert] @ x_D).chunk(2)
            out = out + score[expert] / total * (moe.experts.w2_EDF[expert] @ (F.silu(gate) * up))
        if moe.shared_experts is not None:
            gate, up = (moe.shared_experts.gate_up_proj.weight @ x_D).chunk(2)
            rows.append(config.routed_scaling_factor * out + moe.shared_experts.down_proj.weight @ (F.silu(gate) * up))
        else:
            rows.append(config.routed_scaling_factor * out)
        choices.append(chosen)
    return torch.stack(rows).view_as(x_BTD), choices


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"n_group": 4, "topk_group": 2, "num_experts_per_tok": 3, "routed_scaling_factor": 2.5},
        {"n_group": 1, "num_experts_per_tok": 8, "norm_topk_prob": False, "n_shared_experts": 2},
        {"n_group": 1, "num_experts_per_tok": 1, "n_shared_experts": 0},
        {"scoring_func": "softmax", "n_group": 1, "norm_topk_prob": False},
        {"scoring_func": "softmax", "n_group": 4, "topk_group": 1, "norm_topk_prob": False},
    ],
)
def test_values_and_gradients_equal_a_loop_over_tokens(changes: dict[str, object], make_config: MakeConfig) -> None:
    config = make_config(**changes)
    bias = [0.2, -0.9, -0.1, 0.3, -0.4, 0.0, -0.2, -0.6] if config.scoring_func == "sigmoid" else None
    moe = layer(config, bias).double()
    x = torch.randn(3, 7, config.hidden_size, dtype=torch.float64, requires_grad=True)
    weight = torch.randn_like(x)
    expected, choices = naive(moe, x)
    inputs = [x, *moe.parameters()]
    expected_grads = torch.autograd.grad((expected * weight).sum(), inputs)
    out = moe(x)
    grads = torch.autograd.grad((out.hidden_BTD * weight).sum(), inputs)
    # The router works in fp32 whatever the rest does.
    torch.testing.assert_close(out.hidden_BTD, expected, rtol=1e-5, atol=1e-5)
    for got, want in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    counts = torch.bincount(torch.tensor(choices).flatten(), minlength=config.n_routed_experts)
    assert out.counts_E.tolist() == counts.tolist()


def test_an_expert_without_tokens_costs_nothing_and_gets_zero_gradient(make_config: MakeConfig) -> None:
    config = make_config(n_group=1, topk_group=1)
    moe = layer(config, [9.0, 0, 0, 0, 0, 0, 0, -9.0])
    x = torch.randn(2, 9, config.hidden_size)
    out = moe(x)
    assert out.counts_E[0] == 18, "every token takes the favoured expert"
    assert out.counts_E[7] == 0
    out.hidden_BTD.sum().backward()
    w13, w2 = moe.experts.w13_EFD.grad, moe.experts.w2_EDF.grad
    assert w13 is not None
    assert w2 is not None
    assert w13[7].count_nonzero() == 0
    assert w2[7].count_nonzero() == 0
    assert w13[0].count_nonzero() > 0


def test_dropped_groups_stay_dropped_when_all_biased_scores_are_negative(make_config: MakeConfig) -> None:
    config = make_config(n_group=2, topk_group=1, num_experts_per_tok=3)
    logits = torch.tensor([[3.0, 2.0, -4.0, -4.0, 1.0, 1.0, 1.0, 1.0]])
    # Group 0 has the better top 2 (0.95 + 0.88 against 0.73 twice). All scores are below 0 with the bias: masking
    # group 1 with 0 instead of -inf would choose from it.
    routing = route(logits, torch.full((8,), -5.0), config)
    assert set(routing.experts_NK[0].tolist()) in ({0, 1, 2}, {0, 1, 3})


def test_the_bias_moves_the_choice_but_not_the_weights_or_the_gradient(make_config: MakeConfig) -> None:
    config = make_config(n_group=1, topk_group=1)
    logits = torch.randn(5, 8, requires_grad=True)
    plain = route(logits, torch.zeros(8), config)
    shifted = route(logits, torch.tensor([0, 0, 0, 0, 0, 0, 2.0, 2.0]), config)
    assert set(shifted.experts_NK.flatten().tolist()) == {6, 7}
    assert set(plain.experts_NK.flatten().tolist()) != {6, 7}
    scores = logits.sigmoid()[:, 6:]
    order = shifted.experts_NK.argsort(dim=-1)
    expected = scores / scores.sum(-1, keepdim=True)
    torch.testing.assert_close(shifted.weight_NK.gather(1, order), expected)


def test_balance_loss_equals_the_formula_written_out() -> None:
    batch, length, experts, chosen_each = 3, 5, 4, 2
    score = torch.rand(batch, length, experts) + 0.1
    picks = score.topk(chosen_each, dim=-1).indices
    expected = 0.0
    for b in range(batch):
        for e in range(experts):
            f = experts / (chosen_each * length) * sum(e in picks[b, t].tolist() for t in range(length))
            p = sum((score[b, t, e] / score[b, t].sum()).item() for t in range(length)) / length
            expected += f * p / batch
    chosen = F.one_hot(picks, experts).sum((1, 2)).float()
    assert sequence_balance_loss(score, chosen, chosen_each).item() == pytest.approx(expected, rel=1e-5)


def test_balance_loss_is_one_when_balanced_and_grows_when_not() -> None:
    even = sequence_balance_loss(torch.ones(1, 8, 4), torch.full((1, 4), 4.0), 2)
    skewed = torch.tensor([0.9, 0.9, 0.01, 0.01]).expand(1, 8, 4)
    assert even.item() == pytest.approx(1.0)
    assert sequence_balance_loss(skewed, torch.tensor([[8.0, 8, 0, 0]]), 2) > 1.9


def test_the_models_balance_loss_is_the_sum_over_its_layers(
    make_config: MakeConfig, make_model: Callable[..., DeepseekV3], make_tokens: Callable[..., Tensor]
) -> None:
    config = make_config()
    model = make_model(config)
    seen: list[Tensor] = []
    for moe in model.moe_layers():
        moe.register_forward_hook(lambda _, __, out: seen.append(out.balance_loss))
    out = model(make_tokens(config, 2, 16))
    assert len(seen) == 3
    assert out.balance_loss.item() == pytest.approx(sum(loss.item() for loss in seen))
    out.balance_loss.backward()
    first = model.moe_layers()[0]
    assert first.gate.weight.grad is not None
    assert first.gate.weight.grad.abs().sum() > 0
