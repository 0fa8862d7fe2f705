"""NVFP4 weights: e2m1 values, one e4m3 scale for each 16 of a row, and one fp32 scale for the tensor.

A value is e2m1 * (scale / global scale). The global scale, 448 * 6 over the tensor's largest magnitude, makes the
largest block's scale e4m3's largest number. On disk it is compressed-tensors' "nvfp4-pack-quantized" without scales of
activations: engines run the weights alone in 4 bits. The number format and its block size: NVIDIA, "Pretraining Large
Language Models with NVFP4", arXiv 2509.25149, section 2; values: OCP Microscaling Formats specification 1.0, 5.3.3.

Shapes: O output channel, I input channel, G = I / 16 block, B = I / 2 byte.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from model.numerics.e4m3 import DTYPE as FP8
from model.numerics.e4m3 import MAX as FP8_MAX
from model.numerics.schemes import Entry, Scheme, compressed_tensors_arguments, compressed_tensors_group
from model.numerics.strips import pack_nibbles, scratch, strips, unpack_nibbles

BLOCK = 16
# Largest value of e2m1: the others are 0, 0.5, 1, 1.5, 2, 3 and 4.
MAX = 6.0
# compressed-tensors gives a block whose scale rounds to zero this one; its values round to zero under any.
_SCALE_OF_ZEROS = 0.125
# Adding 1.5 * 2^22 times a power of two rounds to its halves, for there fp32 has no finer numbers.
_ROUNDING = 1.5 * 2**22
# An fp16 number 2^-14 times an e2m1 value has its code's exponent and first significand bit behind the sign.
_TO_HALF = 2.0**-14


@dataclass(frozen=True)
class Nvfp4(Scheme):
    """Scheme of codes, two a byte (`_packed`), e4m3 scales [O, G] (`_scale`) and an fp32 scale [1] (`_global_scale`).

    Weights that are quantized together get one global scale.
    """

    joint = True

    @property
    def config(self) -> Mapping[str, Any]:
        """Weights alone: activations stay in 16 bits."""
        weights = compressed_tensors_arguments(
            num_bits=4, type="float", strategy="tensor_group", group_size=BLOCK, scale_dtype=str(FP8)
        )
        return compressed_tensors_group("nvfp4-pack-quantized", weights, None)

    def entries(self, rows: int, columns: int) -> Mapping[str, Entry]:
        """Codes and both kinds of scales."""
        return {
            "_packed": Entry((rows, columns // 2), torch.uint8),
            "_scale": Entry((rows, columns // BLOCK), FP8),
            "_global_scale": Entry((1,), torch.float32),
        }

    def shape(self, stored: Mapping[str, Tensor]) -> tuple[int, int]:
        """Shape from the codes."""
        rows, half = stored["_packed"].shape
        return rows, 2 * half

    def quantize(self, weights: Sequence[Tensor]) -> list[dict[str, Tensor]]:
        """To the nearest, under the global scale of the largest magnitude of all `weights`."""
        amax = torch.stack([_amax(weight_OI) for weight_OI in weights]).amax()
        global_scale_1 = global_scale(amax)
        stored = []
        for weight_OI in weights:
            packed_OB, scale_OG = quantize(weight_OI, global_scale_1)
            stored.append({"_packed": packed_OB, "_scale": scale_OG, "_global_scale": global_scale_1.clone()})
        return stored

    def restore(self, stored: Mapping[str, Tensor], rows: slice, out: Tensor) -> None:
        """Values times their block's scale over the global one."""
        scale_OG = stored["_scale"][rows].float() / stored["_global_scale"]
        decode(stored["_packed"][rows], out).view(*scale_OG.shape, BLOCK).mul_(scale_OG[:, :, None])

    def round_inputs(self, x_NI: Tensor) -> Tensor:
        """Inputs as they are."""
        return x_NI


def global_scale(amax: Tensor) -> Tensor:
    """fp32 scale [1] of a tensor with this largest magnitude; 1 for zeros and where it would overflow."""
    scale = FP8_MAX * MAX / amax.float()
    return torch.where(scale.isfinite(), scale, 1.0).reshape(1)


def quantize(weight_OI: Tensor, global_scale_1: Tensor) -> tuple[Tensor, Tensor]:
    """Codes uint8 [O, B], the first value of two in the lower bits, and e4m3 scales [O, G].

    Args:
        global_scale_1: see `global_scale`.
    """
    rows, columns = weight_OI.shape
    packed_OB = torch.empty(rows, columns // 2, dtype=torch.uint8, device=weight_OI.device)
    scale_OG = torch.empty(rows, columns // BLOCK, dtype=FP8, device=weight_OI.device)
    work = scratch(weight_OI)
    for part in strips(weight_OI):
        strip_OGB = work[: part.stop - part.start].copy_(weight_OI[part]).view(-1, columns // BLOCK, BLOCK)
        exact_OG1 = _largest(strip_OGB).div_(MAX).mul_(global_scale_1)
        rounded_OG1 = exact_OG1.clamp_(max=FP8_MAX).to(FP8).float()
        rounded_OG1 = torch.where(rounded_OG1 > 0, rounded_OG1, _SCALE_OF_ZEROS)
        scale_OG[part] = rounded_OG1[:, :, 0]
        packed_OB[part] = encode(strip_OGB.div_(rounded_OG1.div_(global_scale_1)).flatten(1))
    return packed_OB, scale_OG


def encode(values_OI: Tensor) -> Tensor:
    """Codes uint8 [O, B] of fp32 values: the nearest of e2m1, of two the even one, larger ones 6. Overwrites them."""
    values_OI.clamp_(-MAX, MAX)
    power_OI = values_OI.view(torch.int32).bitwise_and(0x7F800000).view(torch.float32)
    power_OI.clamp_(min=1.0).mul_(_ROUNDING)
    rounded_OI = (values_OI + power_OI).sub_(power_OI)
    # A negative value that rounds to zero keeps its sign.
    half_OI = rounded_OI.copysign_(values_OI).mul_(_TO_HALF).half().view(torch.int16)
    codes_OI = (half_OI >> 9).bitwise_and_(7).bitwise_or_((half_OI >> 12).bitwise_and_(8)).to(torch.uint8)
    return pack_nibbles(codes_OI)


def decode(packed_OB: Tensor, out: Tensor | None = None) -> Tensor:
    """fp32 values [O, I] of codes, in `out` if it is given."""
    codes_OI = unpack_nibbles(packed_OB).to(torch.int16)
    half_OI = (codes_OI & 7).bitwise_left_shift_(9).bitwise_or_((codes_OI & 8).bitwise_left_shift_(12))
    if out is None:
        out = torch.empty(half_OI.shape, device=packed_OB.device)
    return out.copy_(half_OI.view(torch.float16)).div_(_TO_HALF)


def _largest(values_OGB: Tensor) -> Tensor:
    """Largest magnitude of each block [O, G, 1], by halves: a CPU takes thrice that to reduce 16 neighbours."""
    values_OGB = values_OGB.abs()
    while (half := values_OGB.shape[2] // 2) > 0:
        values_OGB = torch.maximum(values_OGB[:, :, :half], values_OGB[:, :, half:])
    return values_OGB


def _amax(weight_OI: Tensor) -> Tensor:
    """Largest magnitude of a weight, fp32."""
    return torch.maximum(weight_OI.amax(), weight_OI.amin().neg()).float()
