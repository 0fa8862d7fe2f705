"""Owns layers that keep int8 weights in memory and dequantize them on use.

It knows nothing of how the int8 values were chosen: see model/quantize.py.

Shapes: O output channel, I input channel, N any leading dimensions, E expert, D hidden, F intermediate, R routed row.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.experts import Experts
from model.layers import Fp32Buffers


class Int8Linear(Fp32Buffers):
    """A bias-free linear layer of int8 weights and one fp32 scale per output channel."""

    weight_int8: Tensor
    weight_scale: Tensor

    def __init__(self, inputs: int, outputs: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.register_buffer("weight_int8", torch.empty(outputs, inputs, dtype=torch.int8))
        self.register_buffer("weight_scale", torch.empty(outputs, 1, dtype=torch.float32))

    @property
    def weight(self) -> Tensor:
        """The dequantized weight [O, I], made anew at each call."""
        return dequantize(self.weight_int8, self.weight_scale, self.dtype)

    def forward(self, x_NI: Tensor) -> Tensor:
        """x times the dequantized weight."""
        return F.linear(x_NI, self.weight)


class Int8Experts(Fp32Buffers, Experts):
    """Routed experts of int8 weights; only experts that have rows are dequantized, one at a time."""

    w13_int8_EFD: Tensor
    w13_scale_EF1: Tensor
    w2_int8_EDF: Tensor
    w2_scale_ED1: Tensor

    def __init__(self, experts: int, width: int, intermediate: int, dtype: torch.dtype) -> None:
        nn.Module.__init__(self)
        self.dtype = dtype
        self.register_buffer("w13_int8_EFD", torch.empty(experts, 2 * intermediate, width, dtype=torch.int8))
        self.register_buffer("w13_scale_EF1", torch.empty(experts, 2 * intermediate, 1))
        self.register_buffer("w2_int8_EDF", torch.empty(experts, width, intermediate, dtype=torch.int8))
        self.register_buffer("w2_scale_ED1", torch.empty(experts, width, 1))

    def run(self, rows_RD: Tensor, weight_R: Tensor, counts_E: Tensor) -> Tensor:
        """Each row through its expert."""
        counts = counts_E.tolist()
        weight_R = weight_R.to(rows_RD.dtype)
        parts = []
        pieces = zip(torch.split(rows_RD, counts), torch.split(weight_R, counts), strict=True)
        for expert, (x_RD, scale_R) in enumerate(pieces):
            if x_RD.shape[0]:
                w13_FD = dequantize(self.w13_int8_EFD[expert], self.w13_scale_EF1[expert], x_RD.dtype)
                w2_DF = dequantize(self.w2_int8_EDF[expert], self.w2_scale_ED1[expert], x_RD.dtype)
                gate_RF, up_RF = F.linear(x_RD, w13_FD).chunk(2, dim=-1)
                parts.append(F.linear(F.silu(gate_RF) * up_RF * scale_R[:, None], w2_DF))
        return torch.cat(parts)


def dequantize(values: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """values * scale, multiplied in fp32 and then rounded to `dtype`."""
    return (values * scale).to(dtype)


def use_int8(model: nn.Module, quantized: set[str], dtype: torch.dtype) -> None:
    """Replace the named linear layers and experts of `model` by int8 ones on the same device, values unset.

    Args:
        quantized: module names, as in `named_modules`.
        dtype: of the dequantized weights, so of the arithmetic.
    """
    for name in sorted(quantized):
        module = model.get_submodule(name)
        parent = model.get_submodule(name.rpartition(".")[0])
        replacement: nn.Module
        if isinstance(module, Experts):
            experts, width, intermediate = module.w2_EDF.shape
            with module.w2_EDF.device:
                replacement = Int8Experts(experts, width, intermediate, dtype)
        elif isinstance(module, nn.Linear):
            with module.weight.device:
                replacement = Int8Linear(module.in_features, module.out_features, dtype)
        else:
            raise TypeError(f"{name} is a {type(module).__name__}; only nn.Linear and Experts have int8 forms")
        setattr(parent, name.rpartition(".")[2], replacement)
