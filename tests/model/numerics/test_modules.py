"""Quantized modules over schemes: fused parts, casts, experts, and what they have no form of."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from model.experts import Experts, looped_experts
from model.model_config import ModelConfig
from model.numerics import mixes
from model.numerics.fp8_blocks import Fp8Blocks
from model.numerics.fp8_channel import Fp8Channel
from model.numerics.int4_groups import Int4Groups
from model.numerics.int8_channel import Int8Channel
from model.numerics.modules import QuantizedExperts, QuantizedLinear, buffer_name, round_inputs_of
from model.numerics.nvfp4 import Nvfp4
from model.numerics.schemes import Scheme

SCHEMES = [Int8Channel(), Fp8Channel(), Fp8Blocks(), Int4Groups(32), Nvfp4()]


def store(module: nn.Module, name: str, scheme: Scheme, parts: list[Tensor], expert: int | None = None) -> Tensor:
    """Quantize the parts of one weight into a module's buffers, and return the weight they stand for."""
    stored = scheme.quantize(parts)
    for suffix in stored[0]:
        buffer = module.get_buffer(buffer_name(name, suffix))
        (buffer if expert is None else buffer[expert]).copy_(torch.cat([one[suffix] for one in stored]))
    weights = [torch.empty(part.shape) for part in parts]
    for one, weight in zip(stored, weights, strict=True):
        scheme.dequantize(one, weight)
    return torch.cat(weights)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("parts", [1, 2])
def test_a_linear_layer_is_that_of_its_dequantized_parts(scheme: Scheme, parts: int) -> None:
    """Parts of 80 rows are no whole blocks: each has its own."""
    torch.manual_seed(0)
    layer = QuantizedLinear(scheme, 64, parts * 80, torch.float32, parts=parts)
    weight = store(layer, "weight", scheme, [torch.randn(80, 64) * (1 + 9 * part) for part in range(parts)])
    x = torch.randn(3, 5, 64)
    assert torch.equal(layer.weight, weight)
    assert torch.equal(layer(x), x @ weight.t())
    assert not list(layer.parameters())


@pytest.mark.parametrize("scheme", SCHEMES)
def test_experts_are_those_of_their_dequantized_weights(scheme: Scheme) -> None:
    torch.manual_seed(1)
    experts = QuantizedExperts(scheme, 3, 64, 32)
    w13, w2 = torch.zeros(3, 64, 64), torch.zeros(3, 64, 32)
    for expert in range(3):
        w13[expert] = store(experts, "w13_EFD", scheme, [torch.randn(32, 64), torch.randn(32, 64) * 7], expert)
        w2[expert] = store(experts, "w2_EDF", scheme, [torch.randn(64, 32)], expert)
    rows, weight, counts = torch.randn(9, 64), torch.rand(9), torch.tensor([4, 0, 5])
    expected = looped_experts(rows, weight, counts, w13, w2)
    torch.testing.assert_close(experts.run(rows, weight, counts), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_cast_leaves_what_is_stored(scheme: Scheme) -> None:
    layer = QuantizedLinear(scheme, 64, 32, torch.bfloat16)
    before = {name: buffer.dtype for name, buffer in layer.named_buffers()}
    assert before == {buffer_name("weight", suffix): e.dtype for suffix, e in scheme.entries(32, 64).items()}
    for dtype in (torch.float16, torch.float32):
        assert {name: buffer.dtype for name, buffer in layer.to(dtype).named_buffers()} == before
    assert layer.weight.dtype == torch.bfloat16


def test_other_modules_have_no_quantized_form(make_config: Callable[..., ModelConfig]) -> None:
    quantization = mixes.int8(make_config())
    with pytest.raises(TypeError, match=r"o_proj.weight is of a LayerNorm"):
        quantization.replacement("model.layers.0.self_attn.o_proj.weight", nn.LayerNorm(4), torch.float32)
    assert quantization.replacement("model.layers.0.mlp.gate.weight", nn.Linear(1, 1), torch.float32) is None
    with torch.device("meta"):
        experts = quantization.replacement(
            "model.layers.1.mlp.experts.0.gate_proj.weight", Experts(2, 8, 4), torch.half
        )
    assert isinstance(experts, QuantizedExperts)
    assert next(experts.buffers()).is_meta


@pytest.mark.parametrize("scheme", SCHEMES)
def test_experts_round_what_enters_each_of_their_weights(scheme: Scheme) -> None:
    """Small routing weights change nothing: they are scales of whole rows."""
    torch.manual_seed(2)
    experts = QuantizedExperts(scheme, 1, 64, 32)
    w13 = store(experts, "w13_EFD", scheme, [torch.randn(32, 64), torch.randn(32, 64)], 0)
    w2 = store(experts, "w2_EDF", scheme, [torch.randn(64, 32)], 0)
    rows, weight = torch.randn(9, 64), torch.rand(9) * 1e-3
    round_inputs_of(nn.Sequential(experts))
    gate, up = (scheme.round_inputs(rows) @ w13.t()).chunk(2, dim=-1)
    expected = scheme.round_inputs(nn.functional.silu(gate) * up) @ w2.t() * weight[:, None]
    torch.testing.assert_close(experts.run(rows, weight, torch.tensor([9])), expected, rtol=1e-4, atol=1e-6)
