"""Owns DeepSeek's fp8 weight format: e4m3 values in 128 x 128 blocks, each block with one fp32 scale.

It knows nothing of files. The released DeepSeek-V3 checkpoint is in this format; nothing here writes it.

Shapes: O output channel, I input channel; scales are ceil(O / 128) x ceil(I / 128).
"""

from __future__ import annotations

import math

from torch import Tensor

SCALE_SUFFIX = "_scale_inv"
# weight_block_size of the released config.json.
BLOCK = 128


def scale_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """Shape of the scales of a weight [O, I]; a last block may be partial."""
    return math.ceil(shape[0] / BLOCK), math.ceil(shape[1] / BLOCK)


def dequantize_blocks(values_OI: Tensor, scale: Tensor) -> Tensor:
    """values[i, j] * scale[i // 128, j // 128], fp32 [O, I]."""
    rows, columns = values_OI.shape
    wide = scale.float().repeat_interleave(BLOCK, 0)[:rows].repeat_interleave(BLOCK, 1)[:, :columns]
    return values_OI.float() * wide
