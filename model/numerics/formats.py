"""Quantization formats by name: the protocol that a format implements, and the registry that the configuration checks.

The registry needs no torch, so that a configuration can be validated where none is installed; an implementation is
imported when it is first used. A new format is a file of its own and a line in `FORMATS`.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, cast

from base.errors import ConfigError, WeightsError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

# The projections of attention, dense layers, shared and routed experts; not mlp.gate, eh_proj, embeddings, head.
_PROJECTION = re.compile(
    r"\.(self_attn\.(q|q_a|q_b|kv_b|o)_proj|self_attn\.kv_a_proj_with_mqa"
    r"|mlp\.(experts\.\d+\.|shared_experts\.)?(gate|up|down)_proj)\.weight$"
)


class StoredEntry(NamedTuple):
    """Stored name of one state entry of a quantized module: the plain parameter's released name plus a suffix."""

    parameter: str
    """The parameter of the plain module, like `weight` or `w13_EFD`; it decides the released names and the slicing."""
    suffix: str
    """Appended to the released name, like `_scale`; empty for a tensor that takes the weight's own name."""


class QuantizationFormat(Protocol):
    """Quantization format: how weights are quantized, described in config.json, and kept in memory.

    Quantizing is local to a group of weights: nothing is kept from one group to the next, so workers may share a
    folder's files among themselves in any way.
    """

    @property
    def entries(self) -> Mapping[str, StoredEntry]:
        """State entries of this format's modules, by the last part of their name."""

    @property
    def quantization_config(self) -> Mapping[str, Any]:
        """The `quantization_config` that config.json gets."""

    def recognizes(self, quantization_config: Mapping[str, Any]) -> bool:
        """Whether a config.json describes this format."""

    def group(self, hf_name: str) -> str | None:
        """Key of the group that a released weight is quantized in; `None` for one that keeps its type.

        Weights with one key are quantized together, for example those that share a scale.
        """

    def quantize(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors as they are stored, by name, of one group's weights (any float type)."""

    def dequantize(self, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """fp32 weights of one group by released name; the reverse of `quantize` up to its rounding error."""

    def replacement(self, name: str, module: nn.Module, dtype: torch.dtype) -> nn.Module:
        """A module of this format for an nn.Linear or Experts, values unset, that computes in `dtype`.

        Args:
            name: dotted path of `module` in the model.
        """


@dataclass(frozen=True)
class FormatEntry:
    """Registry entry of a format: what is known without importing its implementation."""

    implementation: str
    """`module:attribute` of the QuantizationFormat."""
    description: str
    """One line for reports."""
    min_compute_capability: tuple[int, int] | None = None
    """Oldest CUDA compute capability that runs its modules; `None` also runs on CPUs."""

    def load(self) -> QuantizationFormat:
        """The implementation, imported on first use."""
        module, _, attribute = self.implementation.partition(":")
        return cast(QuantizationFormat, getattr(importlib.import_module(module), attribute))


FORMATS: dict[str, FormatEntry] = {
    "int8": FormatEntry("model.numerics.int8_format:FORMAT", "int8, symmetric, per output channel"),
}
DEFAULT_FORMAT = "int8"


def is_projection(hf_name: str) -> bool:
    """Whether a released weight is a projection of attention, an MLP or an expert: what the release stores in fp8."""
    return _PROJECTION.search(hf_name) is not None


def find_format(name: str) -> FormatEntry:
    """Registry entry of a format.

    Raises:
        ConfigError: no such format; lists those there are.
    """
    if name not in FORMATS:
        raise ConfigError(f"quantization format: {format_rule()} (got {name!r})")
    return FORMATS[name]


def format_rule() -> str:
    """The rule for a format's name, for error messages."""
    return f"must be one of {', '.join(sorted(FORMATS))}"


def detect_format(config: Mapping[str, Any], origin: str) -> str | None:
    """Name of the format that a config.json describes; `None` for plain weights and the release's fp8 blocks.

    Raises:
        WeightsError: the folder is quantized in a format that is not registered.
    """
    described = config.get("quantization_config")
    if not described or is_release_fp8(described):
        return None
    for name, entry in FORMATS.items():
        if entry.load().recognizes(described):
            return name
    method = described.get("quant_method")
    raise WeightsError(
        f"{origin}: quantization_config describes no format that can be loaded: {format_rule()}, or DeepSeek's fp8 "
        f"(got quant_method {method!r}, format {described.get('format')!r}). Quantize the plain weights again."
    )


def is_release_fp8(quantization_config: Mapping[str, Any]) -> bool:
    """Whether weights are in DeepSeek's fp8 blocks, which a reader dequantizes (model/weights/reader.py)."""
    return quantization_config.get("quant_method") == "fp8"
