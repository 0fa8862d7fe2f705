"""fp8 weights in blocks: e4m3 values in 128 x 128 blocks with one fp32 scale each, as DeepSeek releases them.

On disk the scales are `weight_scale_inv` of the release's own format, or `weight_scale` of compressed-tensors'
"float-quantized"; the numbers are the same.

Shapes: O output channel, I input channel; scales are ceil(O / 128) x ceil(I / 128). N block.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from model.numerics.activations import e4m3_in_groups
from model.numerics.e4m3 import DTYPE, PROBE, decode, exact_scales
from model.numerics.schemes import Entry, Scheme, compressed_tensors_arguments, compressed_tensors_group
from model.numerics.strips import largest_magnitude, scratch, strips

SCALE_SUFFIX = "_scale_inv"
# weight_block_size of the released config.json.
BLOCK = 128
# Rows of blocks whose scales are searched at once.
_SEARCHED = 4


@dataclass(frozen=True)
class Fp8Blocks(Scheme):
    """Scheme of e4m3 values under the weight's own name, and fp32 scales, one a block, under the name with a suffix."""

    suffix: str = "_scale"
    """`_scale` of compressed-tensors, or `_scale_inv` of the release."""

    joint = False

    @property
    def config(self) -> Mapping[str, Any]:
        """Static weights in blocks, dynamic activations in groups of 128 per token."""
        weights = compressed_tensors_arguments(
            num_bits=8, type="float", strategy="block", block_structure=[BLOCK, BLOCK]
        )
        activations = compressed_tensors_arguments(
            num_bits=8, type="float", strategy="group", group_size=BLOCK, dynamic=True
        )
        return compressed_tensors_group("float-quantized", weights, activations)

    def entries(self, rows: int, columns: int) -> Mapping[str, Entry]:
        """Values and scales."""
        return {"": Entry((rows, columns), DTYPE), self.suffix: Entry(scale_shape((rows, columns)), torch.float32)}

    def shape(self, stored: Mapping[str, Tensor]) -> tuple[int, int]:
        """Shape of the values."""
        rows, columns = stored[""].shape
        return rows, columns

    def quantize(self, weights: Sequence[Tensor]) -> list[dict[str, Tensor]]:
        """See `quantize_blocks`."""
        return [dict(zip(("", self.suffix), quantize_blocks(weight_OI), strict=True)) for weight_OI in weights]

    def restore(self, stored: Mapping[str, Tensor], rows: slice, out: Tensor) -> None:
        """Values times their block's scale."""
        _restore(stored[""], stored[self.suffix], rows, out)

    def round_inputs(self, x_NI: Tensor) -> Tensor:
        """See `e4m3_in_groups`."""
        return e4m3_in_groups(x_NI, BLOCK)


def scale_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """Shape of the scales of a weight [O, I]; the last block of a dimension may be partial."""
    return math.ceil(shape[0] / BLOCK), math.ceil(shape[1] / BLOCK)


def quantization_config() -> dict[str, Any]:
    """`quantization_config` of the released config.json."""
    return {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [BLOCK, BLOCK],
    }


def dequantize_blocks(values_OI: Tensor, scale: Tensor, *, row: int = 0, column: int = 0) -> Tensor:
    """values[i, j] * scale[i // 128, j // 128], fp32 [O, I].

    Args:
        row: offset of the first row in its block, 0 to 127, when the values are a slice of a weight; `scale` then
            begins with that block.
        column: offset of the first column in its block, 0 to 127.
    """
    result_OI = torch.empty(values_OI.shape, device=values_OI.device)
    for rows in strips(values_OI):
        _restore(values_OI, scale, rows, result_OI[rows], row=row, column=column)
    return result_OI


def _restore(values_OI: Tensor, scale: Tensor, rows: slice, out: Tensor, *, row: int = 0, column: int = 0) -> None:
    """Set `out`, fp32, to some rows of `dequantize_blocks`."""
    first, stop = row + rows.start, row + rows.stop
    for block in range(first // BLOCK, math.ceil(stop / BLOCK)):
        part = slice(max(0, block * BLOCK - first), min(stop, (block + 1) * BLOCK) - first)
        decode(values_OI[rows][part], out[part], _along_row(scale[block], column + out.shape[1])[column:])


def quantize_blocks(weight_OI: Tensor) -> tuple[Tensor, Tensor]:
    """e4m3 values [O, I] and fp32 scales, each its block's largest magnitude over 448; a block of zeros gets scale 1.

    A block that was dequantized from this format is reproduced exactly, see `exact_scales`.
    """
    values_OI = torch.empty(weight_OI.shape, dtype=DTYPE, device=weight_OI.device)
    scale = torch.cat([_scales(part_OI) for part_OI in torch.split(weight_OI, _SEARCHED * BLOCK)])
    work = scratch(weight_OI[:BLOCK])
    for rows in strips(weight_OI, BLOCK):
        strip = work[: rows.stop - rows.start].copy_(weight_OI[rows])
        values_OI[rows] = strip.div_(_along_row(scale[rows.start // BLOCK], weight_OI.shape[1]))
    return values_OI, scale


def _scales(weight_OI: Tensor) -> Tensor:
    """Scales of some rows of blocks."""
    high, wide = scale_shape(weight_OI.shape)
    amax_I = torch.zeros(high, wide * BLOCK, device=weight_OI.device)
    for rows in strips(weight_OI, BLOCK):
        block_I = amax_I[rows.start // BLOCK, : weight_OI.shape[1]]
        torch.maximum(block_I, largest_magnitude(weight_OI[rows], 0)[0], out=block_I)
    amax = amax_I.view(high, wide, BLOCK).amax(2)
    probe_NP = _blocks(weight_OI[::BLOCK], 1)[:, :PROBE]
    return exact_scales(amax.flatten(), probe_NP, lambda chosen_N: _blocks(weight_OI, BLOCK)[chosen_N]).view_as(amax)


def _along_row(scale_N: Tensor, columns: int) -> Tensor:
    """fp32 scales of a row of blocks, one a column."""
    return scale_N.float().repeat_interleave(BLOCK)[:columns]


def _blocks(weight_OI: Tensor, block_rows: int) -> Tensor:
    """fp32 values [N, B] of blocks of so many rows and 128 columns, row by row; zeros fill partial ones."""
    rows, columns = weight_OI.shape
    padded_OI = F.pad(weight_OI.float(), (0, -columns % BLOCK, 0, -rows % block_rows))
    blocks = padded_OI.view(-1, block_rows, padded_OI.shape[1] // BLOCK, BLOCK).transpose(1, 2)
    return blocks.reshape(-1, block_rows * BLOCK)
