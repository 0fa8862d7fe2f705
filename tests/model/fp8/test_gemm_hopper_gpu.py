"""The fp8 GEMM on Hopper GPUs: results that repeat bit for bit, and sums kept in fp32."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model.fp8.linear import fp8_linear

Chosen = Callable[..., Tensor]
Numbers = Callable[..., Tensor]
Relative = Callable[[Tensor, Tensor], float]
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9,
        reason="needs a Hopper GPU and finds none",
    ),
]


def test_the_same_operands_give_the_same_bits(numbers: Numbers) -> None:
    x, weight = numbers(1024, 512), numbers(768, 512, seed=1)
    assert torch.equal(fp8_linear(x, weight), fp8_linear(x, weight))


def test_a_deep_sum_keeps_what_tensor_cores_alone_would_lose(relative: Relative) -> None:
    """8,192 products, the second half 2^-8 of the first: 14 bits of a sum would drop them one by one."""
    x, weight = torch.full((128, 8192), 1.0), torch.full((128, 8192), 1.0)
    x[:, 4096:] = 2**-8
    out = fp8_linear(x.to("cuda", torch.bfloat16), weight.to("cuda", torch.bfloat16))
    exact = F.linear(x[:1], weight[:1]).item()
    assert relative(out, torch.full(out.shape, exact, device="cuda")) < 2**-8
