"""Errors of a tensor against sums over all of it, and clipped values of every layout of stored numbers."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from model.numerics import int4_groups
from model.numerics.formats import Restore
from model.numerics.fp8_blocks import Fp8Blocks
from model.numerics.fp8_channel import Fp8Channel
from model.numerics.int8_channel import Int8Channel
from model.numerics.schemes import Scheme
from model.numerics.strips import as_rows
from model.quantization.tensor_error import find_codes, measure, of_weight

E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def rows_of(restored: Tensor) -> Restore:
    return lambda rows, out: out.copy_(as_rows(restored)[rows])


@pytest.mark.parametrize("shape", [(1000, 700), (3, 20_000), (5,), (0, 4)])
def test_errors_are_those_of_the_whole_tensor(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(shape, generator=generator).bfloat16()
    restored = weight.float() + 0.01 * torch.randn(shape, generator=generator)
    found = measure(weight, rows_of(restored), None)
    exact, error = weight.double(), restored.double() - weight.double()
    assert found["squared"] == pytest.approx(float(exact.square().sum()), rel=1e-5)
    assert found["error_squared"] == pytest.approx(float(error.square().sum()), rel=1e-5)
    assert found["max_abs_error"] == pytest.approx(float(error.abs().max()) if weight.numel() else 0.0, rel=1e-5)
    if weight.numel():
        assert found["rel_error"] == pytest.approx(float(error.norm() / exact.norm()), rel=1e-5)
    assert found["clipped"] is None


def test_a_weight_of_zeros_has_no_relative_error() -> None:
    assert measure(torch.zeros(4, 4), rows_of(torch.zeros(4, 4)), None)["rel_error"] == 0.0


def int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    values = weight.round().clamp(-127, 127).to(torch.int8)
    return values, values.float()


def e4m3(weight: Tensor) -> tuple[Tensor, Tensor]:
    values = weight.clamp(-448, 448).to(torch.float8_e4m3fn)
    return values, values.float()


def int4(weight: Tensor) -> tuple[Tensor, Tensor]:
    values = weight.round().clamp(-8, 7).to(torch.int8)
    return int4_groups.pack(values), values.float()


def e2m1(weight: Tensor) -> tuple[Tensor, Tensor]:
    codes = (weight.abs()[..., None] - E2M1).abs().argmin(-1).to(torch.uint8)
    restored = E2M1[codes.long()] * weight.sign()
    signed = codes | ((weight < 0).to(torch.uint8) << 3)
    return signed[:, ::2] | (signed[:, 1::2] << 4), restored


@pytest.mark.parametrize(
    ("quantize", "inside", "outside"),
    [
        (int8, [127.49, -127.49, 126.6, 0.0], [127.6, -130.0]),
        (e4m3, [463.0, -463.0, 440.0, 0.0], [465.0, -1000.0]),
        (int4, [7.49, -8.49, 6.6, 0.0], [7.6, -8.9]),
        (e2m1, [6.99, -6.99, 5.1, 0.0], [7.1, -9.0]),
    ],
)
def test_values_beyond_the_range_count_as_clipped_and_rounded_ones_do_not(
    quantize: object, inside: list[float], outside: list[float]
) -> None:
    assert callable(quantize)
    row = torch.tensor([*inside, *outside, 0.0, 0.0]).repeat(3)  # 24 values
    weight = row.repeat(50, 1)
    stored, restored = quantize(weight)
    codes = find_codes({"a.weight": stored, "a.weight_scale": torch.ones(50, 1)}, "a.weight", weight.shape)
    assert codes is not None
    assert measure(weight, rows_of(restored), codes)["clipped"] == pytest.approx(2 / 8)
    odd = find_codes({"a.weight": stored[:, :-1].contiguous()}, "a.weight", weight.shape)
    assert odd is None, "of another width"


def test_the_number_of_values_need_not_be_a_multiple_of_anything() -> None:
    weight = torch.tensor([[200.0, 1.0, -200.0], [1.0, 2.0, 3.0], [-128.0, 127.0, 0.0]])
    values, restored = int8(weight)
    assert measure(weight, rows_of(restored), find_codes({"w": values}, "w", weight.shape))["clipped"] == pytest.approx(
        3 / 9
    )


@pytest.mark.parametrize("scheme", [Int8Channel(), Fp8Channel(), Fp8Blocks()], ids=["int8", "fp8_channel", "blocks"])
@pytest.mark.parametrize("shape", [(1, 40), (130, 300), (300, 130), (257, 3000)])
def test_figures_are_those_of_the_whole_weight_where_scales_are_known(scheme: Scheme, shape: tuple[int, int]) -> None:
    """None is clipped as it was quantized; under smaller scales many are, in some blocks and not in others."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(5)) * torch.logspace(-3, 0, shape[0])[:, None]
    weight[shape[0] // 2, 10:] = 0.0
    (stored,) = scheme.quantize([weight])
    shrunk = {**stored, "_scale": stored["_scale"].clone()}
    shrunk["_scale"][::2] *= 0.9
    for tensors in (stored, shrunk):
        restored = torch.empty(shape)
        scheme.dequantize(tensors, restored)
        codes = find_codes({"a.weight" + key: tensor for key, tensor in tensors.items()}, "a.weight", weight.shape)
        assert codes is not None
        assert codes.limit is not None
        found = measure(weight, partial(scheme.restore, tensors), codes)
        exact, error = weight.double(), restored.double() - weight.double()
        assert found["rel_error"] == pytest.approx(float(error.norm() / exact.norm()), rel=1e-6)
        assert found["max_abs_error"] == pytest.approx(float(error.abs().max()), rel=1e-6)
        numbers, (end, ratio) = tensors[""].float().abs(), (127, 127.5 / 127) if codes.end == 127 else (448, 464 / 448)
        beyond = (numbers >= end) & (exact.abs() > restored.double().abs() * ratio * (1 + 1e-6))
        assert found["clipped"] == pytest.approx(float(beyond.double().mean()))
        assert bool(found["clipped"]) == (tensors is shrunk)


def test_stored_tensors_belong_to_the_weight_of_their_layer() -> None:
    stored = {name: torch.ones(1) for name in ("a.gate.weight_packed", "a.gate.input_scale", "a.up.weight")}
    assert set(of_weight(stored, "a.gate.weight")) == {"a.gate.weight_packed", "a.gate.input_scale"}
