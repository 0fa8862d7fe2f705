"""Compression codecs of gradient reduction: rounding errors, and values that are not finite."""

import pytest
import torch

from cherry.distributed.compression import BLOCK, CODECS


def values(kind):
    """[2, 4 blocks] of fp32."""
    x = torch.randn(2, 4 * BLOCK, generator=torch.Generator().manual_seed(3))
    if kind == "tiny":
        return x * 1e-41
    if kind == "huge":
        return x * 5e37
    if kind == "decades":
        return x * 10 ** torch.linspace(-12, 6, 4 * BLOCK)
    return x * (torch.arange(4 * BLOCK) // BLOCK % 2)  # every second block is zero


@pytest.mark.parametrize("kind", ["tiny", "huge", "decades", "zeros"])
@pytest.mark.parametrize("name", CODECS)
def test_quantization_error_is_within_half_a_step_of_the_block(name, kind):
    x, codec = values(kind), CODECS[name]
    wire = codec.pack(x)
    assert (wire.shape, wire.dtype) == ((2, codec.wire_bytes(x.shape[1])), torch.uint8)
    error = (codec.unpack(wire, x.shape[1]).double() - x.double()).abs().view(2, -1, BLOCK)
    size = x.double().abs().view(2, -1, BLOCK)
    smallest = torch.finfo(torch.float32).tiny
    largest = size.amax(-1, keepdim=True).clamp_min(codec.limit * smallest if codec.limit else 0)
    bound = {
        "int8": largest / 127 / 2,
        "fp8": torch.maximum(size * 2**-4, largest / 448 * 2**-10),  # half a step of 3 mantissa bits; subnormals'
        "bf16": torch.maximum(size * 2**-8, torch.tensor(smallest)),
    }[name]
    assert (error <= bound * (1 + 1e-5)).all()
    if name == "int8" and kind == "decades":
        assert error.max() > 0.4 * bound.max()  # the bound is no wider than it must be


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("bad", ["nan", "inf", "-inf"])
def test_a_value_that_is_not_finite_stays_so_and_spoils_its_own_block_only(name, bad):
    x = values("zeros")
    x[0, BLOCK + 5] = float(bad)
    found = CODECS[name].unpack(CODECS[name].pack(x), x.shape[1])
    assert not found[0, BLOCK + 5].isfinite()
    found[0, BLOCK : 2 * BLOCK] = 0
    assert found.isfinite().all()
