import pytest
import torch

from model.calibration.awq import ScalingSearch, fold_norm, fold_up, fold_values
from model.calibration.int4_weight import nearest
from model.calibration.second_moment import output_error
from model.layers import SwiGLU
from model.rope import rotary_tables
from model.transformer import Block
from tests.model.calibration.inputs import correlated_rows, weight


def test_scaling_lowers_the_output_error_where_inputs_have_outliers():
    x_NI = torch.randn(500, 64, generator=torch.Generator().manual_seed(3))
    x_NI[:, 7] *= 30
    x_NI[:, 50] *= 20
    moment_II = x_NI.T @ x_NI
    weights = [weight(24, 64, seed) for seed in (1, 2)]
    search = ScalingSearch(moment_II, 64, torch.bfloat16)
    for weight_OI in weights:
        search.add(weight_OI, moment_II)
    scaling_I = search.best()
    assert scaling_I.argmax() == 7
    for weight_OI in weights:
        plain = nearest(weight_OI, 64, torch.bfloat16).dequantized()
        scaled = nearest(weight_OI * scaling_I, 64, torch.bfloat16).dequantized() / scaling_I
        plain_error, scaled_error = (output_error(one - weight_OI, moment_II).sum() for one in (plain, scaled))
        assert scaled_error < 0.6 * plain_error


@pytest.mark.parametrize("unseen", [[3], list(range(64))])
def test_the_factor_of_a_channel_that_was_never_seen_is_bounded(unseen):
    x_NI = correlated_rows(200, 64)
    x_NI[:, unseen] = 0.0
    search = ScalingSearch(x_NI.T @ x_NI, 32, torch.float32)
    search.add(weight(8, 64), x_NI.T @ x_NI)
    scaling_I = search.best()
    assert torch.isfinite(scaling_I).all()
    assert scaling_I.max() / scaling_I.min() < 1e4


@torch.no_grad()
def test_folding_leaves_a_block_s_output_as_it_was(make_config, make_model):
    config = make_config()
    block = make_model(config).layers[0]
    assert isinstance(block, Block)
    assert isinstance(block.mlp, SwiGLU)
    generator = torch.Generator().manual_seed(5)
    x_BTD = torch.randn(2, 7, config.hidden_size, generator=generator)
    tables = rotary_tables(config, torch.arange(7))
    before = block(x_BTD, tables).hidden_BTD
    attention = block.self_attn

    def scaling(width: int) -> torch.Tensor:
        return torch.rand(width, generator=generator) * 3 + 0.2

    fold_norm(block.input_layernorm, [attention.q_a_proj, attention.kv_a_proj_with_mqa], scaling(config.hidden_size))
    fold_norm(attention.q_a_layernorm, [attention.q_b_proj], scaling(config.q_lora_rank))
    fold_norm(attention.kv_a_layernorm, [attention.kv_b_proj], scaling(config.kv_lora_rank))
    fold_values(attention, scaling(config.num_attention_heads * config.v_head_dim))
    fold_norm(block.post_attention_layernorm, [block.mlp.gate_up_proj], scaling(config.hidden_size))
    fold_up(block.mlp.gate_up_proj.weight, block.mlp.down_proj.weight, scaling(config.intermediate_size))
    torch.testing.assert_close(block(x_BTD, tables).hidden_BTD, before, rtol=1e-4, atol=1e-4)
