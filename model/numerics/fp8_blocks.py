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

from model.numerics.activations import e4m3_in_groups
from model.numerics.e4m3 import DTYPE, PROBE, decode, exact_scales
from model.numerics.schemes import Entry, compressed_tensors_arguments, compressed_tensors_group
from model.numerics.strips import largest_magnitude

SCALE_SUFFIX = "_scale_inv"
# weight_block_size of the released config.json.
BLOCK = 128
# Blocks side by side that are worked on at once: 1 MiB of fp32 (see model/numerics/strips.py).
_TILE_BLOCKS = 16
# Rows that are dequantized at once, for the same reason; they divide a block's.
_ROWS = 32
# Rows of blocks whose scales are searched at once.
_SEARCHED = 4


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
    for first in range(0, len(scale), _SEARCHED):
        rows = slice(first * BLOCK, (first + _SEARCHED) * BLOCK)
        _quantize_rows_of_blocks(weight_OI[rows], values_OI[rows], scale[first : first + _SEARCHED])
    return values_OI, scale


def _quantize_rows_of_blocks(weight_OI: Tensor, values_OI: Tensor, scale: Tensor) -> None:
    """Fill `values_OI` and `scale` of some rows of blocks, from one weight's first column to its last."""
    tiles = list(_tiles(weight_OI))
    work = torch.empty(BLOCK, max(columns.stop - columns.start for _, columns in tiles), device=weight_OI.device)
    for rows, columns in tiles:
        tile = work[: rows.stop - rows.start, : columns.stop - columns.start].copy_(weight_OI[rows, columns])
        amax_I = F.pad(largest_magnitude(tile, 0)[0], (0, -tile.shape[1] % BLOCK))
        scale[rows.start // BLOCK, columns.start // BLOCK :][: len(amax_I) // BLOCK] = amax_I.view(-1, BLOCK).amax(1)
    probe_NP = _blocks(weight_OI[::BLOCK], 1)[:, :PROBE]
    found_N = exact_scales(scale.flatten(), probe_NP, lambda chosen_N: _blocks(weight_OI, BLOCK)[chosen_N])
    scale.copy_(found_N.view_as(scale))
    for rows, columns in tiles:
        tile = work[: rows.stop - rows.start, : columns.stop - columns.start].copy_(weight_OI[rows, columns])
        scale_N = scale[rows.start // BLOCK, columns.start // BLOCK : -(-columns.stop // BLOCK)]
        values_OI[rows, columns] = tile.div_(scale_N.repeat_interleave(BLOCK)[: tile.shape[1]])


def _tiles(weight_OI: Tensor) -> Iterator[tuple[slice, slice]]:
    """Rows and columns of parts that are one block high and, on a CPU, stay in the caches."""
    height, columns = weight_OI.shape
    width = _TILE_BLOCKS * BLOCK if weight_OI.device.type == "cpu" else columns
    for row in range(0, height, BLOCK):
        for column in range(0, columns, width):
            yield slice(row, min(height, row + BLOCK)), slice(column, min(columns, column + width))


def _blocks(weight_OI: Tensor, block_rows: int) -> Tensor:
    """fp32 values [N, B] of blocks of so many rows and 128 columns, row by row; zeros fill partial ones."""
    rows, columns = weight_OI.shape
    padded_OI = F.pad(weight_OI.float(), (0, -columns % BLOCK, 0, -rows % block_rows))
    blocks = padded_OI.view(-1, block_rows, padded_OI.shape[1] // BLOCK, BLOCK).transpose(1, 2)
    return blocks.reshape(-1, block_rows * BLOCK)
