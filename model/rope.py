"""Rotary position embeddings (RoPE) on interleaved pairs, with YaRN's frequencies (arXiv 2309.00071).

Shapes: B batch, T position, H head, R rotary width (qk_rope_head_dim), P = R / 2 pairs.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from model.model_config import ModelConfig, YarnConfig


class RotaryTables:
    """Cosines and sines of every position and pair, fp32; [B, T, P] where rows have positions of their own.

    Neither a tuple nor a dataclass, on purpose: FSDP2's mixed precision looks into those among a module's arguments
    and casts their tensors to bf16, and the angles must stay fp32.
    """

    def __init__(self, cos_TP: Tensor, sin_TP: Tensor) -> None:
        self.cos_TP = cos_TP
        self.sin_TP = sin_TP


def inverse_frequencies(config: ModelConfig, device: torch.device | None = None) -> Tensor:
    """Frequencies of the pairs, fp32 [P], in radians per position; YaRN's interpolation applied when configured."""
    width = config.qk_rope_head_dim
    exponent_P = torch.arange(0, width, 2, dtype=torch.float32, device=device) / width
    plain_P = 1.0 / (config.rope_theta**exponent_P)
    yarn = config.rope_scaling
    if yarn is None:
        return plain_P
    low, high = _correction_range(yarn, width, config.rope_theta)
    pair_P = torch.arange(width // 2, dtype=torch.float32, device=device)
    # 0: the pair rotates often enough within the original length and keeps its frequency; 1: interpolated fully.
    ramp_P = ((pair_P - low) / (high - low)).clamp(0, 1)
    return plain_P / yarn.factor * ramp_P + plain_P * (1 - ramp_P)


def _correction_range(yarn: YarnConfig, width: int, theta: float) -> tuple[float, float]:
    """First and last pair of the ramp: those that rotate beta_fast and beta_slow times in the original length."""

    def pair_with_rotations(rotations: float) -> float:
        length = yarn.original_max_position_embeddings
        return width * math.log(length / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair_with_rotations(yarn.beta_fast), pair_with_rotations(yarn.beta_slow)
    if yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    # 0.001 as in the released code: a ramp of no width would divide by zero.
    return float(low), float(high) if high != low else high + 0.001


def rotary_tables(config: ModelConfig, positions_T: Tensor) -> RotaryTables:
    """Tables [T, P] for integer `positions_T` on their device; [B, T, P] where rows have positions of their own.

    Cosine and sine carry YaRN's `rotary_factor`; the part of its temperature that is in ModelConfig.softmax_scale must
    not be applied twice.
    """
    angle_TP = positions_T.float()[..., None] * inverse_frequencies(config, positions_T.device)
    cos_TP, sin_TP = angle_TP.cos(), angle_TP.sin()
    yarn = config.rope_scaling
    if yarn is not None and yarn.rotary_factor != 1.0:
        cos_TP, sin_TP = cos_TP * yarn.rotary_factor, sin_TP * yarn.rotary_factor
    return RotaryTables(cos_TP, sin_TP)


def rotate(x_BTHR: Tensor, tables: RotaryTables) -> Tensor:
    """Queries or keys [B, T, H, R] with the pairs (0, 1), (2, 3), ... rotated by their position's angles, in fp32.

    The result holds all first elements, then all second ones. Queries and keys share that order, so their dot
    products are those of the interleaved order.
    """
    first, second = x_BTHR.float().view(*x_BTHR.shape[:-1], -1, 2).unbind(-1)
    cos_T1P, sin_T1P = tables.cos_TP[..., None, :], tables.sin_TP[..., None, :]
    rotated = torch.cat([first * cos_T1P - second * sin_T1P, second * cos_T1P + first * sin_T1P], dim=-1)
    return rotated.to(x_BTHR.dtype)
