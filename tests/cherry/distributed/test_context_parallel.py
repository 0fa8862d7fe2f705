"""Which positions of a sequence a rank takes, and attention by parts against attention over all at once."""

from __future__ import annotations

import pytest
import torch

from cherry.distributed.context_parallel import positions_of
from model.attention import scaled_dot_product, suffix_attention

CPU = torch.device("cpu")


def test_positions_are_shared_out_once_and_cost_the_same() -> None:
    parts = [positions_of(rank, 3, 24, CPU) for rank in range(3)]
    assert sorted(torch.cat(parts).tolist()) == list(range(24))
    assert parts[1].tolist() == [4, 5, 6, 7, 16, 17, 18, 19]
    # A query at position p looks at p + 1 keys.
    assert len({int((part + 1).sum()) for part in parts}) == 1
    with pytest.raises(ValueError, match="a sequence of 20 does not divide into 6 parts"):
        positions_of(0, 3, 20, CPU)


@pytest.mark.parametrize("length", [1, 5, 12])
def test_attention_of_the_last_positions_is_the_end_of_attention_over_all(length: int) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 3, 12, 8), torch.randn(2, 3, 12, 8), torch.randn(2, 3, 12, 6)
    whole = scaled_dot_product(q, k, v, 0.3, None)
    torch.testing.assert_close(suffix_attention(q[:, :, -length:], k, v, 0.3), whole[:, :, -length:])
