"""A rank's own time on a GPU, by events on its stream."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from cherry.hooks.rank_reports import ForwardTimer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU and finds none"),
]


def test_the_time_of_kernels_counts_and_not_that_of_their_launch() -> None:
    device = torch.device("cuda")
    small, large = (nn.Linear(width, width, device=device) for width in (256, 8192))
    seconds = {}
    for module in (small, large):
        width = module.in_features
        timer = ForwardTimer([module], device)
        for _ in range(3):  # the first loads the kernels
            module(torch.ones(width, width, device=device))
            torch.cuda.synchronize()
            seconds[width] = timer.take()
        timer.close()
    # 2 * 8192^3 operations in fp32 take milliseconds on any GPU, their launch some tens of microseconds.
    assert seconds[8192] is not None and seconds[256] is not None
    assert seconds[8192] > 1e-3 > seconds[256]
