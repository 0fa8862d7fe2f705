"""Quantization formats by name: the protocol that a format implements, and the registry that the configuration checks.

The registry needs no torch, so that a configuration can be validated where none is installed; an implementation is
imported when it is first used. A new format is a function in a file like model/numerics/mixes.py and a line in
`FORMATS`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, cast

from base.errors import ConfigError, WeightsError
from model.numerics.weight_kinds import kind_of

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from model.model_config import ModelConfig


class StoredEntry(NamedTuple):
    """Stored name of one state entry of a quantized module: the plain parameter's released name plus a suffix."""

    parameter: str
    """The parameter of the plain module, like `weight` or `w13_EFD`; it decides the released names and the slicing."""
    suffix: str
    """Appended to the released name, like `_scale`; empty for a tensor that takes the weight's own name."""


Restore = Callable[["slice", "Tensor"], object]
"""Function of rows of a weight, and of fp32 memory [rows, I] that it sets to their values."""


class QuantizationFormat(Protocol):
    """Quantization format for one model: how weights are quantized, described in config.json, and kept in memory.

    Quantizing is local to a group of weights: nothing is kept from one group to the next, so workers may share a
    folder's files among themselves in any way.
    """

    @property
    def entries(self) -> Mapping[str, StoredEntry]:
        """State entries of this format's modules, by the last part of their name."""

    @property
    def quantization_config(self) -> Mapping[str, Any]:
        """The `quantization_config` that config.json gets; empty for plain weights, which have none."""

    def group(self, hf_name: str) -> str | None:
        """Key of the group that a released weight is quantized in; `None` for one that keeps its type.

        Weights with one key are quantized together, for example those that share a scale.
        """

    def quantize(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors as they are stored, by name, of one group's weights (any float type)."""

    def restorers(self, stored: Mapping[str, Tensor]) -> dict[str, Restore]:
        """For each weight of one group, a function that dequantizes rows of it: the reverse of `quantize`."""

    def replacement(self, hf_name: str, module: nn.Module, dtype: torch.dtype) -> nn.Module | None:
        """A module of this format for an nn.Linear or Experts, values unset, that computes in `dtype`.

        Args:
            hf_name: released name of the module's first weight.

        Returns:
            `None` for a module that stays as it is.
        """


@dataclass(frozen=True)
class FormatEntry:
    """Registry entry of a format: what is known without importing its implementation."""

    implementation: str
    """`module:attribute` of a function of a ModelConfig that returns the QuantizationFormat for that model."""
    description: str
    """One line for reports."""
    weights: frozenset[str]
    """How its weights are stored, as `_stored_weights` names it: a config.json of this format has all of these."""
    fallbacks: frozenset[str] = frozenset()
    """What may be there too, for weights whose sizes do not fit."""
    experts_multiple: int = 1
    """Values of a routed expert's row that share a scale: a row must be a multiple of it."""
    milder: str | None = None
    """The format to try next where this one costs too much loss."""
    natural_capability: tuple[int, int] | None = None
    """CUDA compute capability of the first GPUs whose tensor cores multiply its numbers, for which it is the choice."""
    min_compute_capability: tuple[int, int] | None = None
    """Oldest CUDA compute capability that runs its modules; `None` also runs on CPUs."""

    def load(self, config: ModelConfig) -> QuantizationFormat:
        """The format for a model, its implementation imported on first use.

        Raises:
            ConfigError: the model's sizes do not fit the format.
        """
        if (rule := self.misfit(config)) is not None:
            raise ConfigError(f"quantization format: {self.description} {rule}")
        module, _, attribute = self.implementation.partition(":")
        build = cast("Callable[[ModelConfig], QuantizationFormat]", getattr(importlib.import_module(module), attribute))
        return build(config)

    def misfit(self, config: ModelConfig) -> str | None:
        """The rule that a model's sizes break; `None` when they fit."""
        sizes = config.hidden_size, config.moe_intermediate_size
        if all(size % self.experts_multiple == 0 for size in sizes):
            return None
        return (
            f"needs hidden_size and moe_intermediate_size that are multiples of {self.experts_multiple}, the values "
            f"that share a scale (they are {sizes[0]} and {sizes[1]}); fp8_channel and int8 fit any size"
        )

    @property
    def has_int4_groups(self) -> bool:
        """Whether weights are rounded to int4 in groups, which calibration can do better than to the nearest."""
        return _INT4_GROUPS in self.weights

    def recognizes(self, config: Mapping[str, Any]) -> bool:
        """Whether a config.json describes a folder of this format."""
        found = _stored_weights(config)
        return self.weights <= found <= self.weights | self.fallbacks


_FP8_BLOCK, _FP8_CHANNEL = "float-quantized 8 bits block", "float-quantized 8 bits channel"
_INT4_GROUPS = "pack-quantized 4 bits group"

FORMATS: dict[str, FormatEntry] = {
    "bf16": FormatEntry("model.numerics.bf16:Bf16Format", "bf16, as trained", frozenset({"bfloat16"})),
    "fp8": FormatEntry(
        "model.numerics.mixes:fp8",
        "fp8 in blocks of 128 x 128, DeepSeek's own layout",
        frozenset({"fp8"}),
        milder="bf16",
        natural_capability=(9, 0),
    ),
    "fp8_block": FormatEntry(
        "model.numerics.mixes:fp8_block",
        "fp8 in blocks of 128 x 128, compressed-tensors' layout",
        frozenset({_FP8_BLOCK}),
        frozenset({_FP8_CHANNEL}),
        milder="bf16",
    ),
    "fp8_channel": FormatEntry(
        "model.numerics.mixes:fp8_channel",
        "fp8, one scale per output channel",
        frozenset({_FP8_CHANNEL}),
        milder="fp8_block",
        natural_capability=(8, 9),
    ),
    "int8": FormatEntry(
        "model.numerics.mixes:int8",
        "int8, symmetric, per output channel",
        frozenset({"int-quantized 8 bits channel"}),
        milder="bf16",
        natural_capability=(8, 0),
    ),
    "w4a16": FormatEntry(
        "model.numerics.mixes:w4a16",
        "routed experts int4 in groups of 128 input channels, the rest fp8 in blocks",
        frozenset({_INT4_GROUPS, _FP8_BLOCK}),
        frozenset({_FP8_CHANNEL}),
        experts_multiple=32,
        milder="fp8_block",
    ),
    "nvfp4": FormatEntry(
        "model.numerics.mixes:nvfp4",
        "routed experts NVFP4, the rest fp8 in blocks",
        frozenset({"nvfp4-pack-quantized 4 bits tensor_group", _FP8_BLOCK}),
        frozenset({_FP8_CHANNEL}),
        experts_multiple=16,
        milder="fp8_block",
        natural_capability=(10, 0),
    ),
}
DEFAULT_FORMAT = "int8"
AUTO = "auto"
"""Value of a configuration that leaves the choice to `natural_format`."""


def is_projection(hf_name: str) -> bool:
    """Whether a released weight is a projection of attention, an MLP or an expert: what the release stores in fp8."""
    return kind_of(hf_name) is not None


def natural_format(compute_capability: tuple[int, int]) -> str:
    """The format with the smallest numbers that a GPU's tensor cores multiply; the default for one older than all."""
    found = [
        (entry.natural_capability, name)
        for name, entry in FORMATS.items()
        if entry.natural_capability is not None and entry.natural_capability <= compute_capability
    ]
    return max(found)[1] if found else DEFAULT_FORMAT


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
    """Name of the format that a config.json describes; `None` for plain weights of another type than bf16.

    Raises:
        WeightsError: the folder is quantized in a format that is not registered.
    """
    for name, entry in FORMATS.items():
        if entry.recognizes(config):
            return name
    if not (described := config.get("quantization_config")):
        return None
    raise WeightsError(
        f"{origin}: quantization_config describes no format that can be loaded: {format_rule()} (got quant_method "
        f"{described.get('quant_method')!r}, format {described.get('format')!r}). Quantize the plain weights again."
    )


def is_release_fp8(quantization_config: Mapping[str, Any]) -> bool:
    """Whether weights are in DeepSeek's fp8 blocks, which a reader dequantizes (model/weights/reader.py)."""
    return quantization_config.get("quant_method") == "fp8"


def quantized_config(config: Mapping[str, Any], quantization: QuantizationFormat) -> dict[str, Any]:
    """config.json of a folder that was quantized, from its source's."""
    kept = {key: value for key, value in config.items() if key != "quantization_config"}
    if described := quantization.quantization_config:
        return {**kept, "quantization_config": dict(described)}
    return {**kept, **{key: "bfloat16" for key in ("torch_dtype", "dtype") if key in config}}


def _stored_weights(config: Mapping[str, Any]) -> frozenset[str]:
    """How weights are stored, in the words of the registry; empty where it is nothing of what formats here store."""
    described = config.get("quantization_config")
    if not described:
        return frozenset({str(config.get("dtype", config.get("torch_dtype")))})
    if is_release_fp8(described):
        return frozenset({"fp8"})
    groups = described.get("config_groups")
    if described.get("quant_method") != "compressed-tensors" or not isinstance(groups, Mapping):
        return frozenset()
    found = set()
    for group in groups.values():
        weights = group.get("weights") if isinstance(group, Mapping) else None
        if not isinstance(weights, Mapping) or not weights.get("symmetric", True):
            return frozenset()
        layout = group.get("format") or described.get("format")
        found.add(f"{layout} {weights.get('num_bits')} bits {weights.get('strategy')}")
    return frozenset(found)
