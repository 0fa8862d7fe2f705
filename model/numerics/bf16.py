"""bf16 as a format: every weight of a folder in bf16, but for the selection biases."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from model.model_config import ModelConfig
from model.numerics.formats import Restore, StoredEntry
from model.numerics.strips import as_rows


class Bf16Format:
    """Plain weights: nothing to dequantize, no quantization_config, and the model's own modules."""

    entries: Mapping[str, StoredEntry] = MappingProxyType({})
    quantization_config: Mapping[str, Any] = MappingProxyType({})

    def __init__(self, config: ModelConfig) -> None:
        """Any model fits."""

    def group(self, hf_name: str) -> str | None:
        """The weight's own name, and `None` for a selection bias: in bf16 its updates would be rounded away."""
        return None if hf_name.endswith("e_score_correction_bias") else hf_name

    def quantize(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The weights, rounded to bf16."""
        return {name: weight.to(torch.bfloat16) for name, weight in weights.items()}

    def restorers(self, stored: Mapping[str, Tensor]) -> dict[str, Restore]:
        """Functions that copy the weights' rows; a weight of one dimension is one row."""
        return {name: partial(_copy, as_rows(weight)) for name, weight in stored.items()}

    def replacement(self, hf_name: str, module: nn.Module, dtype: torch.dtype) -> nn.Module | None:
        """None: every module stays."""
        return None


def _copy(weight_OI: Tensor, rows: slice, out: Tensor) -> None:
    out.copy_(weight_OI[rows])
