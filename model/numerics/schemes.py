"""Schemes: how one weight is stored quantized. A format (model/numerics/formats.py) gives each kind of weight a scheme.

Shapes: O output channel, I input channel.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from model.numerics.strips import scratch, strips


class Entry(NamedTuple):
    """Shape and type of one stored tensor of a weight."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class Scheme(Protocol):
    """Scheme of one weight [O, I]: its stored tensors, by the suffix that the weight's released name gets for each.

    Schemes are values: two that are equal store a weight alike.
    """

    @property
    def config(self) -> Mapping[str, Any]:
        """The scheme's group in compressed-tensors' `config_groups`, without its targets."""

    @property
    def joint(self) -> bool:
        """Whether gate_proj and up_proj of one MLP share something, and are quantized together for it."""

    def entries(self, rows: int, columns: int) -> Mapping[str, Entry]:
        """Stored tensors of a weight [rows, columns]; the first dimension of each can be laid end to end."""

    def shape(self, stored: Mapping[str, Tensor]) -> tuple[int, int]:
        """Shape [O, I] of a stored weight."""

    def quantize(self, weights: Sequence[Tensor]) -> list[dict[str, Tensor]]:
        """Stored tensors of weights (any float type) that are quantized together, by suffix."""

    def restore(self, stored: Mapping[str, Tensor], rows: slice, out: Tensor) -> None:
        """Set `out`, fp32 [rows, I], to these rows of the weight; both ends of the slice are given, and within it."""

    def dequantize(self, stored: Mapping[str, Tensor], out: Tensor) -> None:
        """Set `out` [O, I] to the weight: multiplied in fp32, then rounded to `out`'s type."""
        work = None if out.dtype == torch.float32 else scratch(out)
        for rows in strips(out):
            if work is None:
                self.restore(stored, rows, out[rows])
            else:
                strip = work[: rows.stop - rows.start]
                self.restore(stored, rows, strip)
                out[rows] = strip

    def round_inputs(self, x_NI: Tensor) -> Tensor:
        """Inputs of a layer as an engine that follows `config` rounds them; themselves where they keep their bits."""


class ChannelScheme(Scheme, ABC):
    """Scheme of 8-bit values under the weight's own name, and fp32 scales [O, 1] under the name with `_scale`."""

    joint = False
    dtype: ClassVar[torch.dtype]
    numbers: ClassVar[str]
    """compressed-tensors' word for the type of the values."""
    layout: ClassVar[str]
    """compressed-tensors' name of how they lie on disk."""

    @property
    def config(self) -> Mapping[str, Any]:
        """Static weights per channel, dynamic activations per token."""
        weights = compressed_tensors_arguments(num_bits=8, type=self.numbers, strategy="channel")
        activations = compressed_tensors_arguments(num_bits=8, type=self.numbers, strategy="token", dynamic=True)
        return compressed_tensors_group(self.layout, weights, activations)

    def entries(self, rows: int, columns: int) -> Mapping[str, Entry]:
        """Values and scales."""
        return {"": Entry((rows, columns), self.dtype), "_scale": Entry((rows, 1), torch.float32)}

    def shape(self, stored: Mapping[str, Tensor]) -> tuple[int, int]:
        """Shape of the values."""
        rows, columns = stored[""].shape
        return rows, columns

    def quantize(self, weights: Sequence[Tensor]) -> list[dict[str, Tensor]]:
        """Values and scales of each weight by itself."""
        return [dict(zip(("", "_scale"), self.quantize_one(weight_OI), strict=True)) for weight_OI in weights]

    @abstractmethod
    def quantize_one(self, weight_OI: Tensor) -> tuple[Tensor, Tensor]:
        """Values [O, I] and fp32 scales [O, 1] of a weight."""


def compressed_tensors_arguments(**given: Any) -> dict[str, Any]:
    """Arguments of one quantized tensor as compressed-tensors writes them: symmetric, what is not given null."""
    defaults = {"symmetric": True, "group_size": None, "block_structure": None, "actorder": None, "dynamic": False}
    return {**defaults, "observer": None if given.get("dynamic") else "minmax", **given}


def compressed_tensors_group(
    layout: str, weights: Mapping[str, Any], activations: Mapping[str, Any] | None
) -> dict[str, Any]:
    """A group of `config_groups` without its targets.

    Args:
        layout: compressed-tensors' name of how the weight lies on disk, like `pack-quantized`.
    """
    return {"weights": weights, "input_activations": activations, "output_activations": None, "format": layout}
