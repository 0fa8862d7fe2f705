"""Rotary position embeddings: YaRN's frequencies, angles of positions, and the rotation of pairs."""

from collections.abc import Callable

import torch

from model.model_config import ModelConfig
from model.rope import inverse_frequencies

MakeConfig = Callable[..., ModelConfig]


def test_yarn_keeps_fast_pairs_and_interpolates_slow_ones(make_config: MakeConfig) -> None:
    plain = inverse_frequencies(make_config(qk_rope_head_dim=64))
    config = make_config(qk_rope_head_dim=64, rope_scaling={}, max_position_embeddings=163840)
    yarn = inverse_frequencies(config)
    assert torch.equal(yarn[:10], plain[:10])
    torch.testing.assert_close(yarn[-8:], plain[-8:] / 40)
    assert ((yarn <= plain) & (yarn >= plain / 40 * 0.999)).all()
