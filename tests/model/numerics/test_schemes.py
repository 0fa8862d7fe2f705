"""What holds for every scheme: entries, shapes, error bounds, repeated quantization, compressed-tensors' reading."""

import math
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme
from torch import Tensor

from model.numerics import strips
from model.numerics.fp8_blocks import SCALE_SUFFIX, Fp8Blocks
from model.numerics.fp8_channel import Fp8Channel
from model.numerics.int4_groups import Int4Groups
from model.numerics.int8_channel import Int8Channel
from model.numerics.nvfp4 import Nvfp4
from model.numerics.schemes import Scheme, compressed_tensors_arguments, compressed_tensors_group

SCHEMES: dict[str, Scheme] = {
    "int8": Int8Channel(),
    "fp8_channel": Fp8Channel(),
    "fp8_blocks": Fp8Blocks(),
    "release": Fp8Blocks(SCALE_SUFFIX),
    "int4/128": Int4Groups(128),
    "int4/32": Int4Groups(32),
    "nvfp4": Nvfp4(),
}
everywhere = pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)


def weights(shape: tuple[int, int], smallest: float = 1e-6) -> Tensor:
    """Rows of rising sizes, one of zeros, one with an outlier."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    weight *= torch.logspace(math.log10(smallest), 0, shape[0])[:, None]
    weight[shape[0] // 2] = 0.0
    weight[shape[0] // 3, 5] = 3.0
    return weight


def restored(scheme: Scheme, stored: dict[str, Tensor], dtype: torch.dtype = torch.float32) -> Tensor:
    out = torch.empty(scheme.shape(stored), dtype=dtype)
    scheme.dequantize(stored, out)
    return out


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)


@everywhere
@pytest.mark.parametrize("shape", [(130, 256), (1, 128), (257, 384)])
def test_entries_are_what_is_stored(scheme: Scheme, shape: tuple[int, int]) -> None:
    (stored,) = scheme.quantize([weights(shape)])
    assert {suffix: (tuple(t.shape), t.dtype) for suffix, t in stored.items()} == scheme.entries(*shape)
    assert scheme.shape(stored) == shape


@everywhere
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_error_is_within_the_number_format_s_bound(scheme: Scheme, dtype: torch.dtype) -> None:
    weight = weights((130, 384)).to(dtype)
    (stored,) = scheme.quantize([weight])
    weight, result = weight.float(), restored(scheme, stored)
    # Half of the distance to the next number, at each weight's size.
    match scheme:
        case Int8Channel():
            bound = stored["_scale"] * 0.5
        case Int4Groups():
            # The largest value lies half a step beyond the last number, and the scale was rounded to bf16.
            bound = stored["_scale"].float().repeat_interleave(scheme.group, 1) * (0.5 + 7.5 * 2**-8)
        case Nvfp4():
            scale = (stored["_scale"].float() / stored["_global_scale"]).repeat_interleave(16, 1)
            bound = torch.maximum(weight.abs() / 4, scale / 4).minimum(scale)
            # A block's scale was rounded as well: the largest values may lie beyond 6.
            amax = weight.abs().view(130, -1, 16).amax(2).repeat_interleave(16, 1)
            bound += torch.maximum(amax / 16, 6 * 2**-10 / stored["_global_scale"])
        case _:
            scale = stored["_scale"] if "_scale" in stored else stored[SCALE_SUFFIX]
            if isinstance(scheme, Fp8Blocks):
                scale = scale.repeat_interleave(128, 0)[:130].repeat_interleave(128, 1)
            bound = torch.maximum(weight.abs() / 16, scale * 2.0**-10)
    assert ((result - weight).abs() <= bound * (1 + 1e-5)).all()
    assert (result[weight == 0] == 0).all()


@pytest.mark.parametrize("scheme", [s for s in SCHEMES.values() if not isinstance(s, Int4Groups)])
def test_what_was_dequantized_quantizes_to_the_same_again(scheme: Scheme) -> None:
    """In int4 it does not: a scale covers 7.5 steps and the largest value is 7 or 8 of them. Nor do NVFP4's blocks that
    are so much smaller than the tensor's largest value, 28,672 times, that their scale has fewer bits than others."""
    (first,) = scheme.quantize([weights((257, 384), smallest=1e-3 if isinstance(scheme, Nvfp4) else 1e-6)])
    (second,) = scheme.quantize([restored(scheme, first)])
    for suffix, tensor in first.items():
        if isinstance(scheme, Int8Channel) and suffix == "_scale":
            # 127 scales and one division: a row in 128 may come back one unit beside.
            near = [tensor.nextafter(torch.full_like(tensor, end)) for end in (0.0, math.inf)]
            assert ((second[suffix] >= near[0]) & (second[suffix] <= near[1])).all()
        elif suffix == "_global_scale":
            assert second[suffix].item() == pytest.approx(tensor.item(), rel=2.0**-22)
        else:
            assert torch.equal(bits(second[suffix]), bits(tensor)), suffix


@everywhere
def test_it_is_the_same_row_by_row_and_in_strips(scheme: Scheme) -> None:
    """What a loader slices by rows is the slice of the whole; a weight larger than a strip is like a small one."""
    weight = weights((256, 2048))
    if isinstance(scheme, Nvfp4):
        weight[0, 0] = weight[128, 0] = weight.abs().max()  # one global scale
    (whole,) = scheme.quantize([weight])
    halves = [scheme.quantize([half])[0] for half in weight.chunk(2)]
    for suffix, tensor in whole.items():
        if suffix not in ("_shape", "_global_scale"):
            assert torch.equal(bits(torch.cat([half[suffix].view(torch.uint8) for half in halves])), bits(tensor))
    assert torch.equal(restored(scheme, whole), torch.cat([restored(scheme, half) for half in halves]))


def whole(scheme: Scheme, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Stored tensors of 8 bits and what they stand for, from operations on all of the weight in fp32."""
    weight, (rows, columns) = weight.float(), weight.shape
    in_blocks, end = isinstance(scheme, Fp8Blocks), 127 if isinstance(scheme, Int8Channel) else 448
    if in_blocks:
        blocks = torch.nn.functional.pad(weight.abs(), (0, -columns % 128, 0, -rows % 128))
        amax = blocks.view(-1, 128, blocks.shape[1] // 128, 128).amax((1, 3))
    else:
        amax = weight.abs().amax(1, keepdim=True)
    scale = torch.where(amax / end >= torch.finfo(torch.float32).tiny, amax / end, 1.0)
    wide = scale.repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :columns] if in_blocks else scale
    quotient = weight / wide
    values = quotient.round().to(torch.int8) if end == 127 else quotient.to(torch.float8_e4m3fn)
    return dict(zip(scheme.entries(1, 1), (values, scale), strict=True)), values.float() * wide


@pytest.mark.parametrize("scheme", [Int8Channel(), Fp8Channel(), Fp8Blocks()], ids=["int8", "fp8_channel", "blocks"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(1, 1), (1, 300), (129, 290), (257, 150), (40, 9000)])
def test_strips_give_the_bits_of_the_whole(
    scheme: Scheme, dtype: torch.dtype, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(strips, "_VALUES", 2000)
    generator = torch.Generator().manual_seed(7)
    weight = torch.randn(shape, generator=generator) * torch.logspace(-6, 2, shape[0])[:, None]
    weight[shape[0] // 2, : shape[1] // 2] = 0.0
    weight[-1, -1] = -weight.abs().max() * 1.5
    weight[shape[0] // 3] *= 1e-36
    weight = weight.to(dtype)
    if shape[0] > 1 and not isinstance(scheme, Int8Channel):  # an int8 of what is no number is not defined
        weight[shape[0] // 4, 0] = math.inf
        weight[shape[0] // 5, -1] = math.nan
    (stored,), (expected, exact) = scheme.quantize([weight]), whole(scheme, weight)
    found = restored(scheme, stored)
    for ours, theirs in [*((stored[key].float(), expected[key].float()) for key in expected), (found, exact)]:
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)
    for rows in (slice(0, 1), slice(shape[0] // 3, shape[0])):
        part = torch.empty(rows.stop - rows.start, shape[1])
        scheme.restore(stored, rows, part)
        torch.testing.assert_close(part, exact[rows], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("scheme", [Int4Groups(32), Nvfp4()], ids=["int4", "nvfp4"])
@pytest.mark.parametrize("shape", [(1, 32), (37, 96), (3, 9600)])
def test_strips_of_any_height_give_the_same_four_bits(
    scheme: Scheme, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = weights((max(2, shape[0]), shape[1]))[: shape[0]].bfloat16()
    (expected,) = scheme.quantize([weight])
    exact = restored(scheme, expected)
    monkeypatch.setattr(strips, "_VALUES", 500)
    (stored,) = scheme.quantize([weight])
    assert all(torch.equal(bits(stored[key]), bits(tensor)) for key, tensor in expected.items())
    assert torch.equal(restored(scheme, stored), exact)
    part = torch.empty(1, shape[1])
    scheme.restore(stored, slice(shape[0] - 1, shape[0]), part)
    assert torch.equal(part, exact[-1:])


@everywhere
@pytest.mark.parametrize("shape", [(256, 512), (200, 384)])
def test_compressed_tensors_reads_the_same_weights(scheme: Scheme, shape: tuple[int, int]) -> None:
    """Bit for bit in the type of its result, which has the scales' precision: bf16 for four bits."""
    (stored,) = scheme.quantize([weights(shape)])
    described = QuantizationScheme.model_validate({"targets": ["Linear"], **scheme.config})
    assert described.format is not None
    library = BaseCompressor.get_value_from_registry(str(described.format))
    theirs = library.decompress({f"weight{suffix.replace('_inv', '')}": t for suffix, t in stored.items()}, described)
    assert theirs["weight"].dtype == (torch.bfloat16 if described.weights.num_bits == 4 else torch.float32)
    assert torch.equal(theirs["weight"], restored(scheme, stored, theirs["weight"].dtype))
    names = set(library.compression_param_names(described))
    assert names == {f"weight{suffix.replace('_inv', '')}" for suffix in stored}


@everywhere
def test_compressed_tensors_rounds_to_the_same_numbers(scheme: Scheme) -> None:
    weight = weights((256, 512))
    (stored,) = scheme.quantize([weight])
    described = QuantizationScheme.model_validate({"targets": ["Linear"], **scheme.config})
    library = BaseCompressor.get_value_from_registry(str(described.format))
    given: dict[str, Any] = {"weight": weight, "weight_scale": stored.get("_scale", stored.get(SCALE_SUFFIX)).float()}  # type: ignore[union-attr]
    if "_global_scale" in stored:
        given["weight_global_scale"] = stored["_global_scale"]
    theirs = library.compress(given, described)
    values = next(suffix for suffix in ("_packed", "") if suffix in stored)
    assert torch.equal(bits(theirs[f"weight{values}"]), bits(stored[values]))
    assert torch.equal(theirs["weight_shape"], stored["_shape"]) if "_shape" in stored else True


def test_arguments_are_symmetric_and_say_what_is_not_set() -> None:
    dynamic = compressed_tensors_arguments(num_bits=8, type="int", strategy="token", dynamic=True)
    static = compressed_tensors_arguments(num_bits=4, type="int", strategy="group", group_size=32)
    assert (dynamic["observer"], static["observer"]) == (None, "minmax")
    assert (dynamic["symmetric"], static["dynamic"], static["group_size"], dynamic["group_size"]) == (
        True, False, 32, None,
    )  # fmt: skip
    group = compressed_tensors_group("pack-quantized", static, None)
    assert QuantizationScheme.model_validate({"targets": ["Linear"], **group}).input_activations is None
