"""Sums of gradients' parts on a GPU: those of plain fp32, in the ranks' order, added to what was there."""

from __future__ import annotations

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU and finds none"),
]


@pytest.mark.parametrize("ranks", [2, 3, 8])
@pytest.mark.parametrize("size", [1, 4096, 10_007])
def test_parts_are_summed_in_fp32_in_the_order_of_the_ranks(ranks: int, size: int) -> None:
    from cherry.distributed.triton_sum import sum_parts

    generator = torch.Generator("cuda").manual_seed(ranks)
    parts_SN = torch.randn(ranks, size, device="cuda", generator=generator).bfloat16()
    expected_N = torch.zeros(size, device="cuda")
    for part_N in parts_SN:
        expected_N += part_N.float()
    for rank in range(ranks):
        others = torch.cat([parts_SN[:rank], parts_SN[rank + 1 :]])
        total_N = torch.full((size + 1,), torch.nan, device="cuda")
        sum_parts(parts_SN[rank], others, rank, total_N[:size], add=False)
        assert torch.equal(total_N[:size], expected_N)
        assert total_N[size].isnan(), "nothing is written past the end"
        total_N = torch.ones(size, device="cuda")
        sum_parts(parts_SN[rank], others, rank, total_N, add=True)
        assert torch.equal(total_N, expected_N + 1)
