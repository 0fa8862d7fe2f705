"""Rotary position embeddings: YaRN's frequencies, angles of positions, and the rotation of pairs."""

import math
from collections.abc import Callable

import pytest
import torch

from model.model_config import ModelConfig
from model.rope import inverse_frequencies, rotary_tables, rotate

MakeConfig = Callable[..., ModelConfig]


def test_yarn_keeps_fast_pairs_and_interpolates_slow_ones(make_config: MakeConfig) -> None:
    plain = inverse_frequencies(make_config(qk_rope_head_dim=64))
    config = make_config(qk_rope_head_dim=64, rope_scaling={}, max_position_embeddings=163840)
    yarn = inverse_frequencies(config)
    assert torch.equal(yarn[:10], plain[:10])
    torch.testing.assert_close(yarn[-8:], plain[-8:] / 40)
    assert ((yarn <= plain) & (yarn >= plain / 40 * 0.999)).all()


def test_a_rotation_is_a_product_of_complex_numbers(make_config: MakeConfig) -> None:
    config = make_config()
    positions_T = torch.tensor([0, 1, 7, 200])
    x_BTHR = torch.randn(2, 4, 3, config.qk_rope_head_dim)
    pairs = torch.view_as_complex(x_BTHR.double().unflatten(-1, (-1, 2)))
    angle_TP = positions_T[:, None] * inverse_frequencies(config).double()
    turned = pairs * torch.polar(torch.ones_like(angle_TP), angle_TP)[:, None]
    expected = torch.cat([turned.real, turned.imag], dim=-1)
    rotated = rotate(x_BTHR, rotary_tables(config, positions_T))
    torch.testing.assert_close(rotated.double(), expected, rtol=1e-4, atol=1e-4)
    assert rotate(x_BTHR.bfloat16(), rotary_tables(config, positions_T)).dtype == torch.bfloat16


def test_rows_may_have_positions_of_their_own(make_config: MakeConfig) -> None:
    config = make_config(rope_scaling={})
    positions_BT = torch.tensor([[0, 1, 2], [5, 0, 9]])
    together = rotary_tables(config, positions_BT)
    for row, positions_T in enumerate(positions_BT):
        alone = rotary_tables(config, positions_T)
        assert torch.equal(together.cos_TP[row], alone.cos_TP)
        assert torch.equal(together.sin_TP[row], alone.sin_TP)


@pytest.mark.parametrize(("mscale", "ratio"), [(1.0, 1.0), (0.5, (0.05 * math.log(40) + 1) / (0.1 * math.log(40) + 1))])
def test_yarns_temperature_scales_cosine_and_sine(mscale: float, ratio: float, make_config: MakeConfig) -> None:
    tables = rotary_tables(make_config(rope_scaling={"mscale": mscale}), torch.arange(6))
    torch.testing.assert_close(tables.cos_TP.square() + tables.sin_TP.square(), torch.full((6, 4), ratio**2))
