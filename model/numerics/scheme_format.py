"""A format made of schemes: one for each kind of projection, in memory and in config.json."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from model.experts import Experts
from model.numerics.formats import Restore, StoredEntry
from model.numerics.modules import QuantizedExperts, QuantizedLinear, buffer_name
from model.numerics.schemes import Scheme
from model.numerics.weight_kinds import Kind, kind_of

_PARAMETERS = ("weight", "w13_EFD", "w2_EDF")
_FUSED = re.compile(r"\.(gate|up)_proj\.weight$")
# Linear layers that compressed-tensors must not quantize.
_IGNORED_LAYERS = ["lm_head", "re:.*mlp\\.gate$", "re:.*eh_proj$", "re:.*shared_head.*"]


class SchemeFormat:
    """Format that stores each kind of projection by its scheme, and leaves every other weight as it is.

    Args:
        quantization_config: of config.json; by default the schemes as compressed-tensors describes them.
    """

    def __init__(self, schemes: Mapping[Kind, Scheme], quantization_config: Mapping[str, Any] | None = None) -> None:
        self._schemes = schemes
        self.quantization_config: Mapping[str, Any] = quantization_config or _compressed_tensors_config(schemes)
        self.entries: Mapping[str, StoredEntry] = {
            buffer_name(parameter, suffix): StoredEntry(parameter, suffix)
            for scheme in schemes.values()
            for parameter in _PARAMETERS
            for suffix in scheme.entries(1, 1)
        }

    def scheme(self, hf_name: str) -> Scheme | None:
        """Scheme of a released weight; `None` for one that keeps its type."""
        kind = kind_of(hf_name)
        return None if kind is None else self._schemes[kind]

    def group(self, hf_name: str) -> str | None:
        """The weight's own name for projections, or one for gate_proj and up_proj; `None` for everything else."""
        if (scheme := self.scheme(hf_name)) is None:
            return None
        return _FUSED.sub(".gate_up_proj.weight", hf_name) if scheme.joint else hf_name

    def quantize(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Stored tensors, each under its weight's name with the scheme's suffix."""
        scheme = self._scheme_of_all(weights)
        stored = zip(weights, scheme.quantize(list(weights.values())), strict=True)
        return {name + suffix: tensor for name, tensors in stored for suffix, tensor in tensors.items()}

    def restorers(self, stored: Mapping[str, Tensor]) -> dict[str, Restore]:
        """The scheme's function for each weight."""
        by_weight: dict[str, dict[str, Tensor]] = {}
        for key, tensor in stored.items():
            stem, leaf, suffix = key.rpartition(".weight")
            by_weight.setdefault(stem + leaf, {})[suffix] = tensor
        scheme = self._scheme_of_all(by_weight)
        return {name: partial(scheme.restore, tensors) for name, tensors in by_weight.items()}

    def replacement(self, hf_name: str, module: nn.Module, dtype: torch.dtype) -> nn.Module | None:
        """A QuantizedLinear or QuantizedExperts on the module's device; `None` for one that is no projection.

        Raises:
            TypeError: the module is neither an nn.Linear nor Experts.
        """
        if (scheme := self.scheme(hf_name)) is None:
            return None
        if isinstance(module, Experts):
            experts, width, intermediate = module.w2_EDF.shape
            with module.w2_EDF.device:
                return QuantizedExperts(scheme, experts, width, intermediate)
        if isinstance(module, nn.Linear):
            parts = 2 if _FUSED.search(hf_name) else 1
            with module.weight.device:
                return QuantizedLinear(scheme, module.in_features, module.out_features, dtype, parts=parts)
        raise TypeError(f"{hf_name} is of a {type(module).__name__}; only nn.Linear and Experts have quantized forms")

    def _scheme_of_all(self, weights: Mapping[str, Any]) -> Scheme:
        schemes = {self.scheme(name) for name in weights}
        scheme = schemes.pop()
        assert scheme is not None and not schemes, "a group's weights are of one kind, and quantized"
        return scheme


def _compressed_tensors_config(schemes: Mapping[Kind, Scheme]) -> dict[str, Any]:
    """`quantization_config` as compressed-tensors 0.12 to 0.20 write it.

    One scheme for all targets every linear layer that is not ignored; several name theirs by expression.
    """
    targets: dict[Scheme, list[str]] = {}
    for kind, scheme in schemes.items():
        targets.setdefault(scheme, []).append(f"re:{kind.value}")
    if len(targets) == 1:
        targets = {scheme: ["Linear"] for scheme in targets}
    groups = {
        f"group_{number}": {"targets": names, **scheme.config} for number, (scheme, names) in enumerate(targets.items())
    }
    layouts = {str(group["format"]) for group in groups.values()}
    return {
        "quant_method": "compressed-tensors",
        "format": layouts.pop() if len(layouts) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": _IGNORED_LAYERS,
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }
