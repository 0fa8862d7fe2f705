"""Attention: the fused kernels against softmax(q k^T) v written out, on each device that there is."""

import pytest
import torch

from model.attention import scaled_dot_product

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU and finds none")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, needs_gpu])]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2e-2), (torch.float32, 1e-4)])
@pytest.mark.parametrize("length", [1, 64, 200])
def test_attention_with_192_wide_keys_and_128_wide_values(
    dtype: torch.dtype,
    tolerance: float,
    length: int,
    device: str,
) -> None:
    torch.manual_seed(0)
    q, k = (torch.randn(2, 4, length, 192, device=device, dtype=dtype, requires_grad=True) for _ in range(2))
    v = torch.randn(2, 4, length, 128, device=device, dtype=dtype, requires_grad=True)
    upstream = torch.randn(2, 4, length, 128, device=device)
    out = scaled_dot_product(q, k, v, 0.135, None)
    grads = torch.autograd.grad((out.float() * upstream).sum(), [q, k, v])
    scores = q.float() @ k.float().transpose(-2, -1) * 0.135
    hidden = torch.ones(length, length, device=device, dtype=torch.bool).triu(1)
    expected = scores.masked_fill(hidden, float("-inf")).softmax(-1) @ v.float()
    expected_grads = torch.autograd.grad((expected * upstream).sum(), [q, k, v])
    # At length 1 the gradients of q and k are zero, so the scale of what came in is the measure there.
    floor = 0.1 * upstream.norm()
    for got, want in zip([out, *grads], [expected, *expected_grads], strict=True):
        assert (got.float() - want.float()).norm() <= tolerance * torch.maximum(want.float().norm(), floor)
