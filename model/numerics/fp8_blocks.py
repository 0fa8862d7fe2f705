"""fp8 weights in blocks: e4m3 values in 128 x 128 blocks with one fp32 scale each, as DeepSeek releases them.

On disk the scales are `weight_scale_inv` of the release's own format, or `weight_scale` of compressed-tensors'
"float-quantized"; the numbers are the same.

Shapes: O output channel, I input channel; scales are ceil(O / 128) x ceil(I / 128). N block.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from model.numerics.e4m3 import DTYPE, MAX, PROBE, decode, exact_scales
from model.numerics.schemes import Entry, compressed_tensors_arguments, compressed_tensors_group
from model.numerics.strips import largest_magnitude

SCALE_SUFFIX = "_scale_inv"
# weight_block_size of the released config.json.
BLOCK = 128
# Blocks side by side that are worked on at once: 256 KiB of fp32 (see model/numerics/strips.py).
_TILE_BLOCKS = 4
# Rows that are dequantized at once, for the same reason.
_ROWS = 16


@dataclass(frozen=True)
class Fp8Blocks:
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

    def dequantize(self, stored: Mapping[str, Tensor], out: Tensor) -> None:
        """See `dequantize_blocks`."""
        for rows, strip in _dequantized(stored[""], stored[self.suffix], 0, 0):
            out[rows] = strip


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
    for rows, strip in _dequantized(values_OI, scale, row, column):
        result_OI[rows] = strip
    return result_OI


def _dequantized(values_OI: Tensor, scale: Tensor, row: int, column: int) -> Iterator[tuple[slice, Tensor]]:
    """Slices of rows with their values, fp32, in memory that the next one overwrites."""
    height, columns = values_OI.shape
    step = _ROWS if values_OI.device.type == "cpu" else BLOCK
    work = torch.empty(step, columns, device=values_OI.device)
    wide = scale.float().repeat_interleave(BLOCK, 1)[:, column : column + columns]
    for block, scale_I in enumerate(wide):
        stop = min(height, (block + 1) * BLOCK - row)
        for first in range(max(0, block * BLOCK - row), stop, step):
            rows = slice(first, min(stop, first + step))
            yield rows, decode(values_OI[rows], work[: rows.stop - first]).mul_(scale_I)


def quantize_blocks(weight_OI: Tensor) -> tuple[Tensor, Tensor]:
    """e4m3 values [O, I] and fp32 scales, each its block's largest magnitude over 448; a block of zeros gets scale 1.

    A block that was dequantized from this format is reproduced exactly, see `exact_scales`.
    """
    values_OI = torch.empty(weight_OI.shape, dtype=DTYPE, device=weight_OI.device)
    scale = torch.empty(scale_shape(weight_OI.shape), device=weight_OI.device)
    for block, scale_N in enumerate(scale):
        rows = slice(block * BLOCK, (block + 1) * BLOCK)
        _quantize_row_of_blocks(weight_OI[rows], values_OI[rows], scale_N)
    return values_OI, scale


def _quantize_row_of_blocks(weight_OI: Tensor, values_OI: Tensor, scale_N: Tensor) -> None:
    """Fill `values_OI` and `scale_N` of at most 128 rows."""
    width = BLOCK * (_TILE_BLOCKS if weight_OI.device.type == "cpu" else len(scale_N))
    work = torch.zeros(weight_OI.shape[0], width, device=weight_OI.device)
    tiles = [slice(first, min(weight_OI.shape[1], first + width)) for first in range(0, weight_OI.shape[1], width)]
    for columns in tiles:
        tile = work[:, : columns.stop - columns.start].copy_(weight_OI[:, columns])
        amax_N = F.pad(largest_magnitude(tile, 0), (0, -tile.shape[1] % BLOCK)).view(-1, BLOCK).amax(1)
        scale_N[columns.start // BLOCK :][: len(amax_N)] = amax_N
    probe_NP = _blocks(weight_OI[:1])[:, :PROBE]
    scale_N.copy_(exact_scales(scale_N.clone(), probe_NP, lambda chosen_N: _blocks(weight_OI)[chosen_N]))
    for columns in tiles:
        tile = work[:, : columns.stop - columns.start].copy_(weight_OI[:, columns])
        scales = scale_N[columns.start // BLOCK :][:_TILE_BLOCKS] if weight_OI.device.type == "cpu" else scale_N
        values_OI[:, columns] = tile.div_(scales.repeat_interleave(BLOCK)[: tile.shape[1]]).clamp_(-MAX, MAX)


def _blocks(weight_OI: Tensor) -> Tensor:
    """fp32 values [N, B] of the blocks that lie side by side in at most 128 rows; zeros fill a partial one."""
    rows, columns = weight_OI.shape
    padded_OI = F.pad(weight_OI.float(), (0, -columns % BLOCK))
    return padded_OI.view(rows, -1, BLOCK).transpose(0, 1).reshape(-1, rows * BLOCK)
