"""Quantized modules: a linear layer and routed experts over any scheme, kept as stored and dequantized on use.

Shapes: O output channel, I input channel, N any leading dimensions, E expert, D hidden, F intermediate, R routed row.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.experts import Experts
from model.layers import Fp32Buffers
from model.numerics.schemes import Scheme

_W13, _W2 = "w13_EFD", "w2_EDF"


def buffer_name(parameter: str, suffix: str) -> str:
    """Name of the buffer that holds one stored tensor of a plain module's parameter."""
    return f"stored_{parameter}{suffix}"


class QuantizedModule(Fp32Buffers):
    """What quantized modules share."""

    scheme: Scheme
    rounds_inputs = False
    """Whether inputs are rounded, as an engine does that multiplies in the scheme's numbers."""

    def rounded(self, x_NI: Tensor) -> Tensor:
        """Inputs [N, I] of a stored weight as they are multiplied."""
        return self.scheme.round_inputs(x_NI) if self.rounds_inputs else x_NI


def round_inputs_of(model: nn.Module) -> None:
    """Have every quantized module of `model` round its inputs, where its scheme says so."""
    for module in model.modules():
        if isinstance(module, QuantizedModule):
            module.rounds_inputs = True


class QuantizedLinear(QuantizedModule):
    """Bias-free linear layer of stored tensors.

    Args:
        parts: stored weights that the layer's rows are made of, of equal size: gate_proj and up_proj are one layer
            here. Their stored tensors lie end to end.
        dtype: type of the dequantized weight.
    """

    kept_types = frozenset({torch.float32, torch.bfloat16, torch.float8_e4m3fn})

    def __init__(self, scheme: Scheme, inputs: int, outputs: int, dtype: torch.dtype, *, parts: int = 1) -> None:
        super().__init__()
        self.scheme, self.dtype, self.parts = scheme, dtype, parts
        self.shape = outputs, inputs
        for suffix, entry in scheme.entries(outputs // parts, inputs).items():
            stored = torch.empty(parts * entry.shape[0], *entry.shape[1:], dtype=entry.dtype)
            self.register_buffer(buffer_name("weight", suffix), stored)

    @property
    def weight(self) -> Tensor:
        """Dequantized weight [O, I], computed on each access."""
        suffixes = self.scheme.entries(1, 1)
        stored = {suffix: self.get_buffer(buffer_name("weight", suffix)) for suffix in suffixes}
        return _dequantize(self.scheme, stored, self.shape, self.dtype, self.parts)

    def forward(self, x_NI: Tensor) -> Tensor:
        """Output [N, O] of the layer with dequantized weights."""
        return F.linear(self.rounded(x_NI), self.weight)


class QuantizedExperts(QuantizedModule, Experts):
    """Routed experts of stored tensors; only experts with routed rows are dequantized, one at a time."""

    kept_types = QuantizedLinear.kept_types

    def __init__(self, scheme: Scheme, experts: int, width: int, intermediate: int) -> None:
        nn.Module.__init__(self)
        self.scheme = scheme
        self.width, self.intermediate = width, intermediate
        for name, parts, rows, columns in ((_W13, 2, intermediate, width), (_W2, 1, width, intermediate)):
            for suffix, entry in scheme.entries(rows, columns).items():
                stored = torch.empty(experts, parts * entry.shape[0], *entry.shape[1:], dtype=entry.dtype)
                self.register_buffer(buffer_name(name, suffix), stored)

    def run(self, rows_RD: Tensor, weight_R: Tensor, counts_E: Tensor) -> Tensor:
        """Output of each routed row's expert [R, D], rows grouped by expert, scaled by the routing weights."""
        counts = counts_E.tolist()
        weight_R = weight_R.to(rows_RD.dtype)
        outputs = []
        slices = zip(torch.split(rows_RD, counts), torch.split(weight_R, counts), strict=True)
        for expert, (x_RD, scale_R) in enumerate(slices):
            if x_RD.shape[0]:
                w13_FD = self._weight(_W13, expert, (2 * self.intermediate, self.width), x_RD.dtype)
                gate_RF, up_RF = F.linear(self.rounded(x_RD), w13_FD).chunk(2, dim=-1)
                w2_DF = self._weight(_W2, expert, (self.width, self.intermediate), x_RD.dtype)
                # Rounding commutes with the routing weight: it is the scale of a row that changes.
                outputs.append(F.linear(self.rounded(F.silu(gate_RF) * up_RF * scale_R[:, None]), w2_DF))
        return torch.cat(outputs)

    def _weight(self, name: str, expert: int, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        suffixes = self.scheme.entries(1, 1)
        stored = {suffix: self.get_buffer(buffer_name(name, suffix))[expert] for suffix in suffixes}
        return _dequantize(self.scheme, stored, shape, dtype, 2 if name == _W13 else 1)


def _dequantize(
    scheme: Scheme, stored: dict[str, Tensor], shape: tuple[int, int], dtype: torch.dtype, parts: int
) -> Tensor:
    """Weight of `shape` whose `parts` lie end to end, in the stored tensors and in the result."""
    weight_OI = torch.empty(shape, dtype=dtype, device=next(iter(stored.values())).device)
    chunks = {suffix: tensor.chunk(parts) for suffix, tensor in stored.items()}
    for part, out in enumerate(weight_OI.chunk(parts)):
        scheme.dequantize({suffix: pieces[part] for suffix, pieces in chunks.items()}, out)
    return weight_OI
