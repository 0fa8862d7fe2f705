"""Multi-head latent attention: fused kernels against softmax(q k^T) v written out, and latents from a KV cache."""

from collections.abc import Callable

import pytest
import torch

from model.attention import Attention, Latents, scaled_dot_product, suffix_attention
from model.model_config import ModelConfig
from model.rope import rotary_tables

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


@pytest.mark.parametrize("yarn", [None, {}])
@pytest.mark.parametrize("rank", [24, None])
def test_latents_in_a_cache_give_the_attention_of_the_whole_sequence(
    yarn: dict[str, float] | None, rank: int | None, make_config: Callable[..., ModelConfig]
) -> None:
    """Queries of the last positions over cached latents, under a mask, are the last rows of causal attention."""
    torch.manual_seed(0)
    attention = Attention(make_config(q_lora_rank=rank, rope_scaling=yarn)).double()
    x_BTD = torch.randn(2, 11, attention.o_proj.out_features, dtype=torch.float64)
    tables = rotary_tables(make_config(rope_scaling=yarn), torch.arange(11))
    queries, latents = attention.queries(x_BTD, tables), attention.latents(x_BTD, tables)
    whole_BTD = attention.attend(queries, latents)
    last = (queries[0][:, 4:], queries[1][:, 4:])
    mask_11TS = torch.ones(7, 11, dtype=torch.bool).tril(4)[None, None]
    torch.testing.assert_close(attention.attend(last, latents, mask_11TS), whole_BTD[:, 4:])
    shorter = Latents(latents.compressed_BSC[:, :6], latents.k_rope_BSR[:, :6])
    first = (queries[0][:, :6], queries[1][:, :6])
    torch.testing.assert_close(attention.attend(first, shorter), whole_BTD[:, :6])


@pytest.mark.parametrize("device", DEVICES)
def test_suffix_attention_is_the_end_of_attention_over_all_positions(device: str) -> None:
    torch.manual_seed(0)
    q, k = (torch.randn(2, 3, 40, 48, device=device) for _ in range(2))
    v = torch.randn(2, 3, 40, 32, device=device)
    whole = scaled_dot_product(q, k, v, 0.2, None)
    for length in (40, 13, 1):
        torch.testing.assert_close(suffix_attention(q[:, :, -length:], k, v, 0.2), whole[:, :, -length:])
