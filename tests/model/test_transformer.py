"""The whole model: causality, MTP, counts, recompute, types and initial weights."""

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import HashStore
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint

from model.model_config import ModelConfig
from model.rope import rotary_tables
from model.transformer import Block, DeepseekV3, initial_values

MakeConfig = Callable[..., ModelConfig]
MakeModel = Callable[..., DeepseekV3]
MakeTokens = Callable[..., Tensor]


def test_no_position_sees_a_later_token(
    make_config: MakeConfig, make_model: MakeModel, make_tokens: MakeTokens
) -> None:
    config = make_config()
    model = make_model(config).train()
    tokens = make_tokens(config, 1, 12)
    changed = tokens.clone()
    changed[0, 7] = (changed[0, 7] + 1) % config.vocab_size
    before, after = model(tokens), model(changed)
    # Not bit for bit: other tokens in an expert's batch may change the order of a sum.
    same = ((before.hidden_BTD - after.hidden_BTD).abs() < 1e-4).all(-1)[0]
    assert same.tolist() == [t < 7 for t in range(12)]
    assert before.mtp_hidden_BTD is not None
    assert after.mtp_hidden_BTD is not None
    same = ((before.mtp_hidden_BTD - after.mtp_hidden_BTD).abs() < 1e-4).all(-1)[0]
    assert same.tolist() == [t < 6 for t in range(12)], "MTP's position t sees tokens up to t + 1"


def test_mtp_is_one_more_block_on_embedding_then_hidden(
    make_config: MakeConfig, make_model: MakeModel, make_tokens: MakeTokens
) -> None:
    config = make_config(num_hidden_layers=1, first_k_dense_replace=0)
    model = make_model(config).train()
    tokens = make_tokens(config, 2, 9)
    out = model(tokens)
    mtp = model.mtp
    assert mtp is not None
    # The block of a second model, whose parity with transformers another test holds.
    other = make_model(make_config(num_hidden_layers=1, first_k_dense_replace=0, num_nextn_predict_layers=0))
    other.layers[0].load_state_dict(mtp.block.state_dict())
    embedded = model.embed_tokens(tokens[:, 1:])

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + config.rms_norm_eps).sqrt() * weight

    halves = [norm(embedded, mtp.enorm.weight), norm(out.hidden_BTD[:, :-1], mtp.hnorm.weight)]
    mixed = torch.cat(halves, dim=-1) @ mtp.eh_proj.weight.T
    expected = other.layers[0](mixed, rotary_tables(config, torch.arange(8))).hidden_BTD
    torch.testing.assert_close(out.mtp_hidden_BTD[:, :-1], norm(expected, mtp.norm.weight), rtol=1e-4, atol=1e-4)
    assert model.eval()(tokens).mtp_hidden_BTD is None


def test_counts_add_up_in_training_only(
    make_config: MakeConfig, make_model: MakeModel, make_tokens: MakeTokens
) -> None:
    config = make_config()
    model = make_model(config).train()
    tokens = make_tokens(config, 2, 10)
    model(tokens)
    once = [moe.tokens_per_expert_E.clone() for moe in model.moe_layers()]
    assert [counts.sum().item() for counts in once] == [2 * 10 * config.num_experts_per_tok] * 3
    model(tokens)
    model.eval()(tokens)
    for moe, counts in zip(model.moe_layers(), once, strict=True):
        assert torch.equal(moe.tokens_per_expert_E, 2 * counts)


class Recomputed(torch.nn.Module):
    """A block whose activations are made again in the backward pass."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.block = block

    def forward(self, *inputs: object) -> object:
        return checkpoint(self.block, *inputs, use_reentrant=False)


def test_recompute_changes_neither_counts_nor_gradients(
    make_config: MakeConfig, make_model: MakeModel, make_tokens: MakeTokens
) -> None:
    config = make_config()
    tokens = make_tokens(config, 2, 10)
    results = []
    for recompute in (False, True):
        model = make_model(config).train()
        moes, parameters = model.moe_layers(), list(model.parameters())
        if recompute:
            for i, block in enumerate(model.layers):
                assert isinstance(block, Block)
                model.layers[i] = Recomputed(block)
        out = model(tokens)
        loss = model.logits(out.hidden_BTD).logsumexp(-1).sum() + out.balance_loss
        grads = torch.autograd.grad(loss, parameters, allow_unused=True)
        results.append([*(moe.tokens_per_expert_E.clone() for moe in moes), *grads])
    for plain, again in zip(*results, strict=True):
        assert (plain is None) == (again is None)
        assert plain is None or torch.equal(plain, again)


def test_bf16_runs_close_to_fp32_and_keeps_biases_fp32(
    make_config: MakeConfig, make_model: MakeModel, make_tokens: MakeTokens
) -> None:
    config = make_config(n_group=1)
    tokens = make_tokens(config, 2, 20)
    reference = make_model(config)
    model = make_model(config)
    model.load_state_dict(reference.state_dict())
    model = model.to(torch.bfloat16).train()
    biases = [
        (a.e_score_correction_bias_E, b.e_score_correction_bias_E)
        for a, b in zip(model.moe_layers(), reference.moe_layers(), strict=True)
    ]
    for kept, original in biases:
        assert kept is not None
        assert original is not None
        assert kept.dtype == torch.float32
        assert torch.equal(kept, original)
    out = model(tokens)
    assert out.hidden_BTD.dtype == torch.bfloat16
    assert out.balance_loss.dtype == torch.float32
    loss = torch.nn.functional.cross_entropy(model.logits(out.hidden_BTD).float().flatten(0, 1), tokens.flatten())
    with torch.no_grad():
        expected = reference.logits(reference(tokens).hidden_BTD)
        expected_loss = torch.nn.functional.cross_entropy(expected.flatten(0, 1), tokens.flatten())
    assert loss.item() == pytest.approx(expected_loss.item(), rel=0.05)
    torch.autograd.backward(loss)
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.fixture
def one_rank() -> Iterator[DeviceMesh]:
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_sharded_bf16_keeps_angles_router_and_biases_fp32(
    one_rank: DeviceMesh, make_config: MakeConfig, make_model: MakeModel, make_tokens: MakeTokens
) -> None:
    config = make_config()
    model = make_model(config).train()
    seen: dict[str, torch.dtype] = {}
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for block in model.layers:
        block.register_forward_hook(lambda _, inputs, __: seen.update(x=inputs[0].dtype, angle=inputs[1].cos_TP.dtype))
        fully_shard(block, mesh=one_rank, mp_policy=policy)
    fully_shard(model, mesh=one_rank, mp_policy=policy)
    out = model(make_tokens(config, 2, 10))
    torch.autograd.backward(model.logits(out.hidden_BTD).float().logsumexp(-1).sum() + out.balance_loss)
    assert seen == {"x": torch.bfloat16, "angle": torch.float32}
    assert out.balance_loss.dtype == torch.float32
    for moe in model.moe_layers():
        assert moe.e_score_correction_bias_E is not None
        assert moe.e_score_correction_bias_E.dtype == torch.float32
        assert moe.tokens_per_expert_E.sum() == 2 * 10 * config.num_experts_per_tok
    gate = model.moe_layers()[0].gate.weight
    assert gate.grad is not None
    assert gate.grad.dtype == torch.float32


def test_autocast_runs_the_experts_in_bf16(
    make_config: MakeConfig, make_model: MakeModel, make_tokens: MakeTokens
) -> None:
    config = make_config()
    model = make_model(config)
    tokens = make_tokens(config, 1, 8)
    seen: list[torch.dtype] = []
    model.moe_layers()[0].experts.register_forward_hook(lambda _, __, out: seen.append(out.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        out = model(tokens)
        loss = model.logits(out.hidden_BTD).float().logsumexp(-1).sum()
    torch.autograd.backward(loss)
    assert seen == [torch.bfloat16]
    assert model.moe_layers()[0].experts.w2_EDF.grad is not None


def test_initial_weights_depend_on_seed_and_name_alone(make_config: MakeConfig) -> None:
    config = make_config()
    first, second, other = DeepseekV3(config), DeepseekV3(config), DeepseekV3(config)
    torch.manual_seed(1)
    first.init_weights(7)
    torch.manual_seed(2)
    second.init_weights(7)
    other.init_weights(8)
    for (name, a), b, c in zip(first.named_parameters(), second.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
        assert a.dim() == 1 or not torch.equal(a, c), name
        if a.numel() > 4000:
            assert a.std().item() == pytest.approx(config.initializer_range, rel=0.1)
    assert torch.equal(first.norm.weight, torch.ones(config.hidden_size))
    one, two, _ = first.moe_layers()
    assert not torch.equal(one.gate.weight, two.gate.weight)


def test_any_rows_of_initial_values_can_be_drawn_alone() -> None:
    shape = torch.Size([11, 700, 300])  # several chunks
    whole = initial_values("w", shape, seed=3, std=0.1)
    parts = [initial_values("w", shape, seed=3, std=0.1, rows=rows) for rows in [(0, 2), (2, 9), (9, 9), (9, 11)]]
    assert torch.equal(torch.cat(parts), whole)
