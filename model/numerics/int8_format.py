"""int8 weights: symmetric, one fp32 scale per output channel; kept as int8 in memory and dequantized on use.

On disk it is compressed-tensors' "int-quantized" W8A8: static weights per channel, dynamic activations per token. The
modules here and the evaluation keep activations as they are; an engine that follows config.json, like vLLM, rounds
them to int8 as well, so what int8 costs there must be measured there.

Shapes: O output channel, I input channel, N any leading dimensions, E expert, D hidden, F intermediate, R routed row.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.experts import Experts
from model.layers import Fp32Buffers
from model.numerics.formats import StoredEntry, is_projection

_MAX = 127
_SCALE_SUFFIX = "_scale"
# Linear layers that compressed-tensors must not quantize.
_IGNORED_LAYERS = ["lm_head", "re:.*mlp\\.gate$", "re:.*eh_proj$", "re:.*shared_head.*"]


class Int8Format:
    """Symmetric int8 per output channel; each weight is a group of its own."""

    entries: Mapping[str, StoredEntry] = {
        "weight_int8": StoredEntry("weight", ""),
        "weight_scale": StoredEntry("weight", _SCALE_SUFFIX),
        "w13_int8_EFD": StoredEntry("w13_EFD", ""),
        "w13_scale_EF1": StoredEntry("w13_EFD", _SCALE_SUFFIX),
        "w2_int8_EDF": StoredEntry("w2_EDF", ""),
        "w2_scale_ED1": StoredEntry("w2_EDF", _SCALE_SUFFIX),
    }

    @property
    def quantization_config(self) -> Mapping[str, Any]:
        """`quantization_config` as compressed-tensors 0.12 writes it for W8A8.

        Weight-only int8 would be what is evaluated here, but engines have kernels for it only in the packed format
        (32-bit words).
        """
        common = {"num_bits": 8, "type": "int", "symmetric": True, "group_size": None, "block_structure": None}
        weights = {**common, "strategy": "channel", "dynamic": False, "observer": "minmax", "actorder": None}
        activations = {**common, "strategy": "token", "dynamic": True, "observer": None, "actorder": None}
        group = {
            "targets": ["Linear"],
            "weights": weights,
            "input_activations": activations,
            "output_activations": None,
            "format": "int-quantized",
        }
        return {
            "quant_method": "compressed-tensors",
            "format": "int-quantized",
            "quantization_status": "compressed",
            "config_groups": {"group_0": group},
            "ignore": _IGNORED_LAYERS,
            "kv_cache_scheme": None,
            "global_compression_ratio": None,
        }

    def recognizes(self, quantization_config: Mapping[str, Any]) -> bool:
        """Whether a config.json describes compressed-tensors' unpacked int8."""
        return (quantization_config.get("quant_method"), quantization_config.get("format")) == (
            "compressed-tensors",
            "int-quantized",
        )

    def group(self, hf_name: str) -> str | None:
        """The weight's own name for projections, `None` for everything else."""
        return hf_name if is_projection(hf_name) else None

    def quantize(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """int8 values under each weight's name, and fp32 scales [O, 1] under the name with `_scale`."""
        stored: dict[str, Tensor] = {}
        for name, weight_OI in weights.items():
            stored[name], stored[name + _SCALE_SUFFIX] = quantize(weight_OI)
        return stored

    def dequantize(self, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """fp32 values * scale of each weight."""
        return {
            name: values_OI * stored[name + _SCALE_SUFFIX]
            for name, values_OI in stored.items()
            if not name.endswith(_SCALE_SUFFIX)
        }

    def replacement(self, name: str, module: nn.Module, dtype: torch.dtype) -> nn.Module:
        """An Int8Linear or Int8Experts on the module's device.

        Raises:
            TypeError: the module is neither an nn.Linear nor Experts.
        """
        if isinstance(module, Experts):
            experts, width, intermediate = module.w2_EDF.shape
            with module.w2_EDF.device:
                return Int8Experts(experts, width, intermediate, dtype)
        if isinstance(module, nn.Linear):
            with module.weight.device:
                return Int8Linear(module.in_features, module.out_features, dtype)
        raise TypeError(f"{name} is a {type(module).__name__}; only nn.Linear and Experts have int8 forms")


def quantize(weight_OI: Tensor) -> tuple[Tensor, Tensor]:
    """int8 values [O, I] and fp32 scales [O, 1] with weight ~ values * scale.

    The scale is the row's largest magnitude over 127, so the error is at most half a scale. A row of zeros gets
    scale 1.
    """
    weight_OI = weight_OI.float()
    scale_O1 = weight_OI.abs().amax(dim=1, keepdim=True) / _MAX
    scale_O1 = torch.where(scale_O1 > 0, scale_O1, torch.ones_like(scale_O1))
    values_OI = (weight_OI / scale_O1).round_().clamp_(-_MAX, _MAX).to(torch.int8)
    return values_OI, scale_O1


class Int8Linear(Fp32Buffers):
    """Bias-free linear layer of int8 weights and one fp32 scale per output channel."""

    weight_int8: Tensor
    weight_scale: Tensor

    def __init__(self, inputs: int, outputs: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.register_buffer("weight_int8", torch.empty(outputs, inputs, dtype=torch.int8))
        self.register_buffer("weight_scale", torch.empty(outputs, 1, dtype=torch.float32))

    @property
    def weight(self) -> Tensor:
        """Dequantized weight [O, I], computed on each access."""
        return dequantize(self.weight_int8, self.weight_scale, self.dtype)

    def forward(self, x_NI: Tensor) -> Tensor:
        """Output [N, O] of the layer with dequantized weights."""
        return F.linear(x_NI, self.weight)


class Int8Experts(Fp32Buffers, Experts):
    """Routed experts of int8 weights; only experts with routed rows are dequantized, one at a time."""

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
        """Output of each routed row's expert [R, D], rows grouped by expert, scaled by the routing weights."""
        counts = counts_E.tolist()
        weight_R = weight_R.to(rows_RD.dtype)
        outputs = []
        slices = zip(torch.split(rows_RD, counts), torch.split(weight_R, counts), strict=True)
        for expert, (x_RD, scale_R) in enumerate(slices):
            if x_RD.shape[0]:
                w13_FD = dequantize(self.w13_int8_EFD[expert], self.w13_scale_EF1[expert], x_RD.dtype)
                w2_DF = dequantize(self.w2_int8_EDF[expert], self.w2_scale_ED1[expert], x_RD.dtype)
                gate_RF, up_RF = F.linear(x_RD, w13_FD).chunk(2, dim=-1)
                outputs.append(F.linear(F.silu(gate_RF) * up_RF * scale_R[:, None], w2_DF))
        return torch.cat(outputs)


def dequantize(values: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """values * scale, multiplied in fp32 and then rounded to `dtype`."""
    return (values * scale).to(dtype)


FORMAT = Int8Format()
