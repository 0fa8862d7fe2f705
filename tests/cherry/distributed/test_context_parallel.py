"""Context parallelism: positions of each rank, and attention by chunks against attention over the whole sequence."""

from __future__ import annotations

import pytest
import torch

from cherry.distributed.context_parallel import head_tail_positions
from model.attention import scaled_dot_product, suffix_attention

CPU = torch.device("cpu")


def test_every_position_has_one_rank_and_ranks_cost_the_same() -> None:
    positions = [head_tail_positions(rank, 3, 24, CPU) for rank in range(3)]
    assert sorted(torch.cat(positions).tolist()) == list(range(24))
    assert positions[1].tolist() == [4, 5, 6, 7, 16, 17, 18, 19]
    # A query at position p attends to p + 1 keys.
    assert len({int((own + 1).sum()) for own in positions}) == 1
    with pytest.raises(ValueError, match=r"sequence length: .*multiple of 6, got 20"):
        head_tail_positions(0, 3, 20, CPU)


@pytest.mark.parametrize("length", [1, 5, 12])
def test_attention_of_the_last_positions_is_the_end_of_attention_over_all(length: int) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 3, 12, 8), torch.randn(2, 3, 12, 8), torch.randn(2, 3, 12, 6)
    whole = scaled_dot_product(q, k, v, 0.3, None)
    torch.testing.assert_close(suffix_attention(q[:, :, -length:], k, v, 0.3), whole[:, :, -length:])
