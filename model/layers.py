"""Common layers: RMSNorm, the SwiGLU feed-forward, and a base for modules whose buffers stay fp32.

Shapes: N any leading dimensions, D hidden width, F intermediate width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Fp32Buffers(nn.Module):
    """Module whose fp32 buffers stay fp32 when it is cast: in bf16 a bias update of 1e-3 would be rounded away."""

    kept_types: frozenset[torch.dtype] = frozenset({torch.float32})
    """Types of buffers that stay when the module is cast."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        kept = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, before in kept.items():
            after = self._buffers[name]
            if after is not None and before.dtype in self.kept_types and before.dtype != after.dtype:
                self._buffers[name] = before.to(after.device)
        return self


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension, computed in fp32 (arXiv 1910.07467)."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x_ND: Tensor) -> Tensor:
        """Normalised rows [N, D], in the input's type."""
        # The fused kernel takes half types with fp32 arithmetic, but only when input and weight have the same type.
        weight_D = self.weight if self.weight.dtype == x_ND.dtype else self.weight.to(x_ND.dtype)
        return F.rms_norm(x_ND, weight_D.shape, weight_D, self.eps)


class SwiGLU(nn.Module):
    """Feed-forward down(silu(gate(x)) * up(x)), with gate and up fused into one weight: one matmul instead of two."""

    def __init__(self, width: int, intermediate: int) -> None:
        super().__init__()
        self.gate_up_proj = nn.Linear(width, 2 * intermediate, bias=False)
        self.down_proj = nn.Linear(intermediate, width, bias=False)

    def forward(self, x_ND: Tensor) -> Tensor:
        """Feed-forward output of each row [N, D]."""
        gate_NF, up_NF = self.gate_up_proj(x_ND).chunk(2, dim=-1)
        down: Tensor = self.down_proj(F.silu(gate_NF) * up_NF)
        return down
